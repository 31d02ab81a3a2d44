"""What targets have in common that learn something about each prompt from the prior."""

from abc import abstractmethod
from typing import Any

import torch

from ..prior import Context, PriorScores, PromptTable
from .base import Target


class PerPromptTarget(Target):
    """
    A target whose log-potential compares a completion with the prior's samples for the same prompt.

    A subclass says what is learned of a prompt ([`~PerPromptTarget.learn`]) and reads it back with
    [`~PerPromptTarget.learned`]; the rest (context, state, prompts without samples) is here.
    """

    needs_context = True
    needs_prior_samples = True

    _table: PromptTable | None = None

    @abstractmethod
    def learn(self, rewards: torch.Tensor) -> torch.Tensor:
        """What is kept of each prompt, `(P, ...)`, from rewards `(P, N, K)` of prior samples."""

    def learned(self, context: Context | None) -> torch.Tensor:
        """What was kept of the prompt of each completion, `(N, ...)`."""
        return self.table.lookup(self.require_context(context).prompt_key)

    @property
    def table(self) -> PromptTable:
        """What was kept, by prompt."""
        self.require_fitted()
        assert self._table is not None
        return self._table

    def fit(self, prior: PriorScores) -> None:
        flat = prior.rewards.flatten(0, 1)  # (P * N, K)
        if self.select(flat).isnan().all():
            read = "reward" if self.rewards is None else " or ".join(map(repr, self.rewards))
            raise ValueError(f"No sample of the prior has a {read}: {type(self).__name__} has nothing to learn from.")
        self._table = PromptTable.of(prior.keys, self.learn(prior.rewards))

    def prior_totals(self, rewards: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each sample's rewards, `(P, N)` from `(P, N, K)`."""
        return self.weighted_sum(rewards.flatten(0, 1)).view(rewards.shape[:2])

    @property
    def is_fitted(self) -> bool:
        return self._table is not None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._table is None else self._table.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._table = PromptTable(**state) if state else None
