"""Several pieces of evidence at once."""

from collections.abc import Sequence
from typing import Any

import torch

from .base import Target


class Product(Target):
    """
    A product of experts: all the evidence of its factors, `phi = sum_i phi_i`.

    For example a hard constraint and a preference,
    `Product([Constraint(rewards="compiles"), Tilt(beta=0.1, rewards="quality")])`. A factor without any reward for a
    completion adds nothing to it; a completion that no factor can score is left out of the update.

    Args:
        factors (`list[Target]`):
            The targets to multiply, usually each with its own `rewards`.
    """

    def __init__(self, factors: Sequence[Target]):
        super().__init__()
        if not factors:
            raise ValueError("`Product` needs at least one factor.")
        self.factors = list(factors)
        self.hard = any(factor.hard for factor in self.factors)

    def bind(self, reward_names: Sequence[str], reward_weights: torch.Tensor | None = None) -> None:
        for factor in self.factors:
            factor.bind(reward_names, reward_weights)

    def log_evidence(self, rewards: torch.Tensor) -> torch.Tensor:
        each = torch.stack([factor.log_evidence(rewards) for factor in self.factors])  # (F, N)
        return each.nansum(dim=0).masked_fill(each.isnan().all(dim=0), torch.nan)

    def settings(self) -> dict[str, Any]:
        return {"factors": self.factors}

    def state_dict(self) -> dict[str, Any]:
        return {str(i): factor.state_dict() for i, factor in enumerate(self.factors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, factor in enumerate(self.factors):
            factor.load_state_dict(state[str(i)])
