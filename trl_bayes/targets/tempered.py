"""The prior itself, sharpened or flattened."""

import math
from typing import Any

import torch

from ..prior import Context
from .base import Target


class Tempered(Target):
    """
    The prior to a power: `phi = (a - 1) log pi_0`, so that `p ∝ pi_0^a` over whole completions.

    Unlike a lower sampling temperature, which sharpens each token, this sharpens the sequence
    ([Power sampling](https://huggingface.co/papers/2603.18363)). It reads no reward; in a [`Product`] it adds to
    targets that do.

    Args:
        a (`float`):
            Power, positive: above 1 sharpens the prior, below 1 flattens it, 1 leaves it as it is.
    """

    reads_rewards = False
    needs_context = True

    def __init__(self, a: float):
        super().__init__()
        if not (math.isfinite(a) and a > 0):
            raise ValueError(f"`Tempered` needs a positive finite power `a`, got {a}.")
        self.a = float(a)

    def log_potential(self, rewards: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        return ((self.a - 1) * self.require_context(context).log_prior).to(rewards)

    def max_log_potential(self) -> float | None:
        """0 where the prior is sharpened, since `log pi_0` is never positive; none where it is flattened."""
        return 0.0 if self.a >= 1 else None

    def settings(self) -> dict[str, Any]:
        return {"a": self.a}
