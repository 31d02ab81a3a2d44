"""The prior conditioned on an event."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .base import Target


class Constraint(Target):
    """
    The prior conditioned on every feature holding: `phi = log 1[r_k >= threshold for all k]`.

    Pointwise generation with distributional control ([Khalifa et al., 2021](https://huggingface.co/papers/2012.11635)):
    `p(y|x) = pi_0(y|x, event)` and `Z(x)` is the prior's probability of the event. Features are reward functions,
    usually 0 or 1. The posterior gives zero probability to completions outside the event, so divergences that are
    infinite there (`reverse_kl`, `pearson_chi2`) cannot be used.

    Args:
        rewards (`str` or `list[str]`, *optional*):
            Names of the reward functions that are features. Defaults to all but those of weight 0.
        threshold (`float`, *optional*, defaults to `0.5`):
            A feature holds when its reward is at least this.
    """

    hard = True

    def __init__(self, rewards: str | Sequence[str] | None = None, threshold: float = 0.5):
        super().__init__(rewards)
        if not math.isfinite(threshold):
            raise ValueError(f"`Constraint` needs a finite `threshold`, got {threshold}.")
        self.threshold = float(threshold)

    def log_potential(self, rewards: torch.Tensor) -> torch.Tensor:
        selected = self.select(rewards)  # (N, K')
        missing = selected.isnan()
        holds = ((selected >= self.threshold) | missing).all(dim=1)  # a feature that does not apply cannot fail
        phi = torch.zeros_like(selected[:, 0]).masked_fill(~holds, float("-inf"))
        return phi.masked_fill(missing.all(dim=1), torch.nan)

    def max_log_potential(self) -> float:
        return 0.0

    def settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold, **super().settings()}
