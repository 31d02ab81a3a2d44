"""The posterior of KL-regularized RL: the prior tilted by the exponential of the reward."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .base import Target


class Tilt(Target):
    r"""
    KL-RL's posterior: `phi = sum_k w_k r_k / beta`.

    Maximizing `E_pi[r] - beta KL(pi||pi_0)` is the same as minimizing `KL(pi||p)` to `p ∝ pi_0 exp(r / beta)`
    ([Korbak et al., 2022](https://huggingface.co/papers/2205.11275)). `beta` is the posterior's temperature, in units
    of reward per nat: small trusts the reward, large trusts the prior.

    Args:
        beta (`float`):
            Temperature, positive.
        rewards (`str` or `list[str]`, *optional*):
            Names of the reward functions to sum, with the trainer's `reward_weights`. Defaults to all.
    """

    def __init__(self, beta: float, rewards: str | Sequence[str] | None = None):
        super().__init__(rewards)
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"`Tilt` needs a positive finite `beta` (the posterior's temperature), got {beta}.")
        self.beta = float(beta)

    def log_potential(self, rewards: torch.Tensor) -> torch.Tensor:
        phi = self.weighted_sum(rewards) / self.beta  # a reward that does not apply adds nothing
        return phi.masked_fill(phi.isinf(), torch.nan)  # a finite reward that overflows is as good as an infinite one

    def settings(self) -> dict[str, Any]:
        return {"beta": self.beta, **super().settings()}
