"""What a sampling algorithm needs to know of models, rewards and target: completions, and what they are worth.

An algorithm asks a [`CompletionSource`] for completions and their evidence, and knows nothing else. In production the
source is a language model ([`~trl_bayes.samplers.language_model.LanguageModelSource`]), in tests a table in which
every probability is known.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..language_models.completions import Completions, Prompt
from ..targets import Target


_NUM_CHECKED = 64  # completions of the prior


class SamplingError(ValueError):
    """What turns out only while sampling: evidence or a proposal with which a method cannot be correct."""


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
    def evaluate(self, prompt_index: Tensor, completion_ids: list[list[int]]) -> Completions:
        """Completions, finished or not, with `rewards`, `phi` and `log_weights` as if they were finished.

        The weights are [`log_weights_of`] their `phi` and [`~CompletionSource.log_ratio`].
        """

    @abstractmethod
    def log_ratio(self, prompt_index: Tensor, completion_ids: list[list[int]]) -> Tensor:
        """`log pi_0 - log q` of completions, finished or not, (M,) float64; without calling the rewards."""

    @abstractmethod
    def decode(self, completion_ids: list[list[int]]) -> list[str]:
        """Their texts."""

    def propose(self, prompt_index: Tensor, *, from_prior: bool = False) -> Completions:
        """Whole completions from the proposal, one for each entry of `prompt_index` (M,)."""
        empty: list[list[int]] = [[] for _ in range(len(prompt_index))]
        return self.evaluate(prompt_index, self.extend(prompt_index, empty, from_prior=from_prior))


def log_weights_of(phi: Tensor, log_ratio: Tensor) -> Tensor:
    """`log P - log q = log pi_0 + phi - log q` (M,); `-inf` without evidence, or without any reward.

    Args:
        phi (`torch.Tensor`): (M,) log-potential; NaN for a completion without any reward.
        log_ratio (`torch.Tensor`): (M,) `log pi_0 - log q`; 0 where the proposal q is the prior.
    """
    return (phi + log_ratio).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def no_completions(source: CompletionSource) -> Completions:
    """An empty set, with as many columns of rewards as any other."""
    return source.evaluate(torch.zeros(0, dtype=torch.int64), [])


def gather(source: CompletionSource, parts: Sequence[Completions]) -> Completions:
    """All parts, of which there may be none."""
    return Completions.concatenate(parts) if parts else no_completions(source)


def check_support(source: CompletionSource) -> None:
    """
    Refuses a proposal that cannot produce what the posterior can, as far as 64 samples of the prior show it.

    Samples of the proposal alone never show what it leaves out.

    Raises:
        SamplingError: a completion with evidence has probability 0 under the proposal; one sentence.
    """
    per_prompt = -(-_NUM_CHECKED // len(source.prompts))
    index = torch.arange(len(source.prompts)).repeat_interleave(per_prompt)[:_NUM_CHECKED]
    drawn = source.propose(index, from_prior=True)
    lost = torch.nonzero(drawn.log_weights.isposinf()).squeeze(1)
    if len(lost):
        raise SamplingError(
            f"The proposal never produces {drawn.texts[int(lost[0])]!r}, which the posterior does: use a policy that "
            "gives some probability to every completion of the prior, such as one that was trained from it."
        )
