"""Completions of some prompts with what is known of each: what sampling, scoring, samplers and evaluation share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..rewards.calling import without_infinite


if TYPE_CHECKING:
    from datasets import Dataset


Prompt = str | list[dict[str, Any]]
Outcome = tuple[int, tuple[int, ...]]
"""A completion with its prompt as one hashable."""

_NUMBERS = ("log_policy", "log_prior", "rewards", "phi", "log_weights")


@dataclass(frozen=True, eq=False)
class Completions:
    """
    N completions of P prompts, and the numbers that have been found for them so far.

    The numbers are tensors with an entry per completion, which are added by name ([`~Completions.with_known`]) and
    read as attributes: `log_policy`, `log_prior`, `rewards`, `phi` and `log_weights`. To read one that is not known is
    an error.

    Attributes:
        prompts (`list`): the P prompts, texts or lists of messages.
        prompt_ids (`list[list[int]]`): their tokens.
        prompt_index (`torch.Tensor`): (N,) int64, which prompt a completion continues.
        completion_ids (`list[list[int]]`): N lists of tokens, the terminal EOS included.
        texts (`list[str]`): the N completions as text, without special tokens.
        ended (`torch.Tensor`): (N,) bool, False for a completion that was cut at the limit.
        known (`Mapping[str, torch.Tensor]`): the numbers, by name.
        diagnostics (`Mapping[str, Any]`): what the method that found the completions says about them all; strict JSON.

    Raises:
        ValueError: a number of another name, or with another number of entries.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    prompt_index: Tensor
    completion_ids: list[list[int]]
    texts: list[str]
    ended: Tensor
    known: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.known.items():
            if name not in _NUMBERS or len(values) != len(self):
                raise ValueError(
                    f"{len(self)} completions cannot have {len(values)} numbers called {name!r}: give one of "
                    f"{', '.join(_NUMBERS)} for each."
                )

    def __len__(self) -> int:
        return len(self.completion_ids)

    # ---------------------------------------------------------------------------------------------------------------
    # What is known of each completion

    @property
    def log_policy(self) -> Tensor:
        """`log pi` (N,) float64 in nats, of the policy that the completions were drawn from."""
        return self._number("log_policy")

    @property
    def log_prior(self) -> Tensor:
        """`log pi_0` (N,) float64 in nats."""
        return self._number("log_prior")

    @property
    def rewards(self) -> Tensor:
        """(N, K) float64; NaN where a reward is missing."""
        return self._number("rewards")

    @property
    def phi(self) -> Tensor:
        """Log-potential (N,) float64 in nats; NaN for a completion without any reward."""
        return self._number("phi")

    @property
    def log_weights(self) -> Tensor:
        """
        (N,) float64 in nats, up to a constant for each prompt.

        Weighted by `exp(log_weights)`, the completions stand for the posterior; `-inf` leaves one out, and 0 for all
        says that there is nothing to correct. Where completions were drawn from a policy q they are
        `log pi_0 + phi - log q`.
        """
        return self._number("log_weights")

    def _number(self, name: str) -> Tensor:
        if name not in self.known:
            raise ValueError(f"The `{name}` of these completions is not known: add it by `with_known({name}=...)`.")
        return self.known[name]

    def with_known(self, **numbers: Tensor) -> "Completions":
        """
        The same completions with more numbers, `(N, ...)` each, or with others in their place.

        Of `rewards` those are left out that [`~trl_bayes.rewards.calling.without_infinite`] leaves out.
        """
        if "rewards" in numbers:
            numbers["rewards"], _ = without_infinite(numbers["rewards"])
        return replace(self, known={**self.known, **numbers})

    @property
    def lengths(self) -> Tensor:
        """Numbers of tokens (N,) float64."""
        return torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.float64)

    def tokens(self) -> list[list[int]]:
        """Each completion's tokens without the terminal EOS, as the measures of diversity read them."""
        return [
            ids[:-1] if ended else ids for ids, ended in zip(self.completion_ids, self.ended.tolist(), strict=True)
        ]

    def outcomes(self) -> list[Outcome]:
        """Each completion with its prompt: two are equal if they are the same outcome."""
        pairs = zip(self.prompt_index.tolist(), self.completion_ids, strict=True)
        return [(index, tuple(ids)) for index, ids in pairs]

    def number_per_prompt(self) -> Tensor:
        """How many completions each prompt has, (P,) int64."""
        return torch.bincount(self.prompt_index, minlength=len(self.prompts))

    # ---------------------------------------------------------------------------------------------------------------
    # Other completions of the same prompts

    def select(self, indices: Tensor) -> "Completions":
        """The completions with these indices (M,)."""
        chosen = indices.tolist()
        return replace(
            self,
            prompt_index=self.prompt_index[indices],
            completion_ids=[self.completion_ids[i] for i in chosen],
            texts=[self.texts[i] for i in chosen],
            ended=self.ended[indices],
            known={name: values[indices] for name, values in self.known.items()},
        )

    def sorted_by_prompt(self) -> "Completions":
        """The same ones, those of the first prompt first; the order of each prompt's own stays."""
        return self.select(self.prompt_index.argsort(stable=True))

    def first_of_each_prompt(self, limits: Tensor) -> "Completions":
        """The first `limits[p]` (P,) of each prompt p, in the order in which they are."""
        return self.select(self.indices_of_first(limits))

    def indices_of_first(self, limits: Tensor) -> Tensor:
        """Which completions [`~Completions.first_of_each_prompt`] takes, (M,) ascending."""
        order = self.prompt_index.argsort(stable=True)
        number = self.number_per_prompt()
        first = number.cumsum(dim=0) - number  # (P,) where each prompt begins in the sorted order
        rank = torch.empty_like(self.prompt_index)
        rank[order] = torch.arange(len(self)) - first[self.prompt_index[order]]
        return torch.nonzero(rank < limits[self.prompt_index]).squeeze(1)

    def where(self, keep: Tensor, other: "Completions") -> "Completions":
        """These completions where `keep` (N,) is True, and the other's elsewhere."""
        rows = torch.arange(len(self))
        return Completions.concatenate([self, other]).select(torch.where(keep, rows, rows + len(self)))

    @staticmethod
    def concatenate(parts: Sequence["Completions"]) -> "Completions":
        """The completions of all parts (at least one), of the same prompts, with the numbers that all of them have."""
        first = parts[0]
        return replace(
            first,
            prompt_index=torch.cat([part.prompt_index for part in parts]),
            completion_ids=[ids for part in parts for ids in part.completion_ids],
            texts=[text for part in parts for text in part.texts],
            ended=torch.cat([part.ended for part in parts]),
            known={
                name: torch.cat([part.known[name] for part in parts])
                for name in first.known
                if all(name in part.known for part in parts)
            },
        )

    # ---------------------------------------------------------------------------------------------------------------
    # In other formats

    def to_dataset(self, tokens: bool = False) -> "Dataset":
        """
        A data set in TRL's prompt-completion format, which [`~trl.SFTTrainer`] reads as it is.

        The columns are `prompt`, `completion` (a list with the assistant's message where the prompt is one of
        messages), `log_weight`, `rewards` (a list, null where one is missing), `log_potential` and `ended`; the three
        numbers as far as they are known.

        From texts `SFTTrainer` makes tokens again, which need not be those that were drawn, and it ends each
        completion with EOS, also one that was cut.

        Args:
            tokens (`bool`, *optional*, defaults to `False`):
                Adds `input_ids` and `completion_mask`, the tokens as they were drawn, which `SFTTrainer` then uses:
                maximum likelihood of exactly these completions, by a model with the prior's tokenizer.
        """
        from datasets import Dataset  # only whoever writes a data set needs it

        index = self.prompt_index.tolist()
        prompts = [self.prompts[i] for i in index]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, self.texts, strict=True)
        ]
        columns: dict[str, list[Any]] = {"prompt": prompts, "completion": completions}
        if "log_weights" in self.known:
            columns["log_weight"] = self.log_weights.tolist()
        if "rewards" in self.known:
            rows = self.rewards.tolist()
            columns["rewards"] = [[None if math.isnan(value) else value for value in row] for row in rows]
        if "phi" in self.known:
            columns["log_potential"] = self.phi.tolist()
        columns["ended"] = self.ended.tolist()
        if tokens:
            pairs = [(self.prompt_ids[i], ids) for i, ids in zip(index, self.completion_ids, strict=True)]
            columns["input_ids"] = [prompt + ids for prompt, ids in pairs]
            columns["completion_mask"] = [[0] * len(prompt) + [1] * len(ids) for prompt, ids in pairs]
        return Dataset.from_dict(columns)
