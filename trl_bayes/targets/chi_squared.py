"""The optimum of chi-squared-regularized RL."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..prior import Context
from .per_prompt import PerPromptTarget


class ChiSquared(PerPromptTarget):
    r"""
    The optimum of chi-squared-regularized RL: `phi = log [1 + (r - tau(x)) / (2 beta)]_+`.

    The maximizer of `E_pi[r] - beta chi2(pi||pi_0)` has a density ratio that is linear in the reward and zero where
    that is negative, and `tau(x)` makes it sum to one, `E_{pi_0}[[1 + (r - tau)/(2 beta)]_+] = 1`
    (https://huggingface.co/papers/2407.13399 uses the same penalty with a KL term besides). The ratio grows linearly
    where [`Tilt`]'s grows exponentially. Completions with `r <= tau - 2 beta` get no probability, so divergences that
    are infinite there (`reverse_kl`, `pearson_chi2`) cannot be used.

    `tau` is exact on the prior samples: `Z = 1` for the empirical prior, and up to `O(1/sqrt(n))` for the prior
    itself.

    Args:
        beta (`float`):
            Regularization, positive, in units of reward.
        rewards (`str` or `list[str]`, *optional*):
            Names of the reward functions to sum, with the trainer's `reward_weights`. Defaults to all.
    """

    hard = True

    def __init__(self, beta: float, rewards: str | Sequence[str] | None = None):
        super().__init__(rewards)
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"`ChiSquared` needs a positive finite `beta` (the regularization), got {beta}.")
        self.beta = float(beta)

    def learn(self, rewards: torch.Tensor) -> torch.Tensor:
        """`tau` of each prompt, `(P,)` float64; `NaN` where no prior sample has a reward."""
        return normalizing_threshold(self.prior_totals(rewards), self.beta)

    def log_potential(self, rewards: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        tau = self.learned(context).to(rewards.device)  # (N,)
        ratio = 1 + (self.weighted_sum(rewards).double() - tau) / (2 * self.beta)
        return ratio.clamp(min=0).log().to(rewards.dtype)

    def log_z(self, keys: torch.Tensor) -> torch.Tensor:
        """Zero for every prompt: `tau` normalizes."""
        tau = self.table.lookup(keys)
        return torch.zeros_like(tau).masked_fill(tau.isnan(), torch.nan)

    def settings(self) -> dict[str, Any]:
        return {"beta": self.beta, **super().settings()}


def normalizing_threshold(rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """
    The root `tau` of `mean_i [1 + (r_i - tau)/(2 beta)]_+ = 1` of each row, exact by sorting.

    The mean is piecewise linear and falls in `tau`. If the `m` highest rewards are the ones inside the bracket, then
    `tau = mean of these m - 2 beta (n - m)/m`; `m` is the largest for which the m-th reward is itself inside.

    Args:
        rewards (`torch.Tensor`): shape `(P, N)`; `NaN` is left out.
        beta (`float`): regularization.

    Returns:
        `torch.Tensor`: shape `(P,)`, float64; `NaN` for a row without any reward.
    """
    scored = ~rewards.isnan()
    descending = rewards.double().masked_fill(~scored, -math.inf).sort(dim=1, descending=True).values
    n = scored.sum(dim=1, keepdim=True).double()  # (P, 1)
    m = torch.arange(1, rewards.size(1) + 1, dtype=torch.float64, device=rewards.device)  # (N,)
    top = descending[:, :1]  # differences from the highest: exact where rewards are large and close
    total = (descending - top).masked_fill(m > n, 0.0).cumsum(dim=1)  # (P, N)
    tau = total / m - 2 * beta * (n - m) / m  # relative to the highest
    inside = descending - top > tau - 2 * beta
    largest = inside.sum(dim=1, keepdim=True).clamp(min=1) - 1  # `inside` holds for the first ones only
    return torch.where(n > 0, top + tau.gather(1, largest), torch.nan).squeeze(1)
