"""What a sampling algorithm needs to know of models, rewards and target: completions, and what they are worth.

An algorithm asks a [`CompletionSource`] for completions and their evidence, and knows nothing else. In production the
source is a language model ([`~trl_bayes.samplers.language_model.LanguageModelSource`]), in tests a table in which
every probability is known.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..language_models.samples import Prompt
from ..targets import Target


class SamplingError(ValueError):
    """What turns out only while sampling: evidence or a proposal with which a method cannot be correct."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """
    Completions with their evidence.

    Attributes:
        prompt_index (`torch.Tensor`): (M,) int64, which prompt a completion continues.
        completion_ids (`list[list[int]]`): M lists of tokens, the terminal EOS included.
        texts (`list[str]`): the M completions as text.
        ended (`torch.Tensor`): (M,) bool, False for a completion without EOS.
        log_ratio (`torch.Tensor`): (M,) float64, `log pi_0 - log q` in nats; 0 where the proposal q is the prior.
        rewards (`torch.Tensor`): (M, K) float64; NaN where a reward is missing.
        phi (`torch.Tensor`): (M,) float64, log-potential in nats; NaN for a completion without any reward.
    """

    prompt_index: Tensor
    completion_ids: list[list[int]]
    texts: list[str]
    ended: Tensor
    log_ratio: Tensor
    rewards: Tensor
    phi: Tensor

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def log_weights(self) -> Tensor:
        """`log P - log q = log pi_0 + phi - log q` (M,); `-inf` without evidence, or without any reward."""
        return (self.phi + self.log_ratio).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    @property
    def lengths(self) -> Tensor:
        """Numbers of tokens (M,) float64."""
        return torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.float64)

    def select(self, indices: Tensor) -> "Candidates":
        """The completions with these indices (L,)."""
        chosen = indices.tolist()
        return Candidates(
            self.prompt_index[indices],
            [self.completion_ids[i] for i in chosen],
            [self.texts[i] for i in chosen],
            self.ended[indices],
            self.log_ratio[indices],
            self.rewards[indices],
            self.phi[indices],
        )

    def where(self, keep: Tensor, other: "Candidates") -> "Candidates":
        """These completions where `keep` (M,) is True, and the other's elsewhere."""
        rows = torch.arange(len(self))
        return concatenate([self, other]).select(torch.where(keep, rows, rows + len(self)))


def concatenate(parts: Sequence[Candidates]) -> Candidates:
    """The completions of all parts (at least one), in their order."""
    return Candidates(
        torch.cat([part.prompt_index for part in parts]),
        [ids for part in parts for ids in part.completion_ids],
        [text for part in parts for text in part.texts],
        torch.cat([part.ended for part in parts]),
        torch.cat([part.log_ratio for part in parts]),
        torch.cat([part.rewards for part in parts]),
        torch.cat([part.phi for part in parts]),
    )


class CompletionSource(ABC):
    """
    A prior, a proposal q, rewards and a target, for some prompts.

    Attributes:
        prompts (`list`): the P prompts.
        prompt_ids (`list[list[int]]`): their tokens.
        max_new_tokens (`int`): T, at which a completion is cut.
        target ([`~trl_bayes.targets.Target`]): bound, and fitted if it learns.
        num_generated (`int`): completions, or parts of them, drawn so far: the cost of sampling.
        num_tokens (`int`): tokens drawn so far.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    max_new_tokens: int
    target: Target
    num_generated: int = 0
    num_tokens: int = 0

    @abstractmethod
    def extend(
        self,
        prompt_index: Tensor,
        prefixes: Sequence[list[int]],
        num_tokens: int | None = None,
        *,
        from_prior: bool = False,
    ) -> list[list[int]]:
        """
        Continues unfinished completions by tokens drawn from the proposal.

        Args:
            prompt_index (`torch.Tensor`): (M,) int64.
            prefixes (`list[list[int]]`): the M beginnings, which may be empty.
            num_tokens (`int`, *optional*): at most so many tokens are drawn. Defaults to all up to EOS or T.
            from_prior (`bool`, *optional*, defaults to `False`): draws from the prior instead.

        Returns:
            `list[list[int]]`: the prefixes with what was drawn.
        """

    @abstractmethod
    def is_finished(self, completion_ids: list[int]) -> bool:
        """Whether a completion has ended, or has T tokens."""

    @abstractmethod
    def evaluate(self, prompt_index: Tensor, completion_ids: list[list[int]]) -> Candidates:
        """Completions, finished or not, with their evidence as if they were finished."""

    @abstractmethod
    def log_ratio(self, prompt_index: Tensor, completion_ids: list[list[int]]) -> Tensor:
        """`log pi_0 - log q` of completions, finished or not, (M,) float64; without calling the rewards."""

    @abstractmethod
    def decode(self, completion_ids: list[list[int]]) -> list[str]:
        """Their texts."""

    def propose(self, prompt_index: Tensor, *, from_prior: bool = False) -> Candidates:
        """Whole completions from the proposal, one for each entry of `prompt_index` (M,)."""
        empty: list[list[int]] = [[] for _ in range(len(prompt_index))]
        return self.evaluate(prompt_index, self.extend(prompt_index, empty, from_prior=from_prior))


def check_support(source: CompletionSource, num_samples: int = 64) -> None:
    """
    Refuses a proposal that cannot produce what the posterior can, as far as samples of the prior show it.

    Samples of the proposal alone never show what it leaves out.

    Raises:
        SamplingError: a completion with evidence has probability 0 under the proposal; one sentence.
    """
    per_prompt = -(-num_samples // len(source.prompts))
    index = torch.arange(len(source.prompts)).repeat_interleave(per_prompt)[:num_samples]
    drawn = source.propose(index, from_prior=True)
    lost = torch.nonzero(drawn.log_weights.isposinf()).squeeze(1)
    if len(lost):
        raise SamplingError(
            f"The proposal never produces {drawn.texts[int(lost[0])]!r}, which the posterior does: use a policy that "
            "gives some probability to every completion of the prior, such as one that was trained from it."
        )
