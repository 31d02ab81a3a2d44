"""Rewards calibrated by their quantiles under the prior."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..prior import Context
from .per_prompt import PerPromptTarget
from .transforms import Transform, build_transform


class Calibrated(PerPromptTarget):
    r"""
    A function of how a completion's reward ranks among the prior's for the same prompt: `phi = Phi(u) / beta`.

        u(x, y) = P_{z~pi_0}(r(z) < r(y)) + P(r(z) = r(y)) / 2

    `u` does not change when the reward is stretched or shifted, prompt by prompt. If the reward is continuous, `u` is
    uniform under the prior, so `Z = \int_0^1 exp(Phi(u)/beta) du` is known and the same for every prompt. With
    [`best_of_n`] the target is the law of best-of-N sampling ([vBoN](https://huggingface.co/papers/2407.06057)), with
    [`ctrl_best_of_n`] and [`ctrl_worst_of_n`] that of
    [InfAlign-CTRL](https://huggingface.co/papers/2412.19792), with [`identity`] that of
    [QRPO](https://huggingface.co/papers/2507.08068).

    From `n` prior samples, `u = (#less + #equal/2 + 1/2) / (n + 1)`: the rank of a new completion among `n + 1`, which
    is one of `n + 1` equally likely values for a continuous reward. So `0 < u < 1` and `log u >= -log(2n + 2)`: what
    is below every prior sample keeps a little evidence, and the lowest quantiles are resolved to `1/n` only.

    Args:
        transform ([`Transform`] or `str`): `Phi`.
        beta (`float`, *optional*):
            Temperature. Defaults to the transform's own: `1/(N-1)` for `best_of_n(N)` and `worst_of_n(N)`.
        rewards (`str` or `list[str]`, *optional*):
            Names of the reward functions whose weighted sum is calibrated. Defaults to all.
    """

    def __init__(
        self, transform: Transform | str, beta: float | None = None, rewards: str | Sequence[str] | None = None
    ):
        super().__init__(rewards)
        self.transform = build_transform(transform)
        beta = self.transform.default_beta if beta is None else beta
        if beta is None:
            raise ValueError(
                f"`Calibrated` needs a `beta` with the transform {self.transform}, which has none of its own: give a "
                "temperature, for instance `beta_for_kl(transform, 0.5)`."
            )
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"`Calibrated` needs a positive finite `beta` (the posterior's temperature), got {beta}.")
        self.beta = float(beta)
        self._looked_for_ties = False

    def learn(self, rewards: torch.Tensor) -> torch.Tensor:
        """Each prompt's rewards in ascending order, `(P, N)`, filled up with `inf`."""
        totals = self.prior_totals(rewards)
        return totals.masked_fill(totals.isnan(), math.inf).sort(dim=1).values

    def calibrate(self, rewards: torch.Tensor, context: Context | None) -> torch.Tensor:
        """The calibrated reward `u` in (0, 1) of each completion, `(N,)` float64; `NaN` where no reward applies."""
        total = self.weighted_sum(rewards)  # (N,)
        unscored = total.isnan()
        rows = self.table.rows(self.require_context(context).prompt_key).to(total.device)
        u = torch.full_like(total, torch.nan, dtype=torch.float64)
        for row in (
            rows.unique().tolist()
        ):  # prompt by prompt: there may be many completions, and many samples of each prompt
            of_prompt = (rows == row) & ~unscored
            prior = self.table.values[row].to(total)  # (n,)
            less, less_or_equal = _ranks(prior, total[of_prompt])
            u[of_prompt] = ((less + less_or_equal) / 2 + 0.5) / (prior.isfinite().sum() + 1)
        return u

    def log_potential(self, rewards: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        return (self.transform(self.calibrate(rewards, context)) / self.beta).to(rewards.dtype)

    def log_z(self, keys: torch.Tensor) -> torch.Tensor:
        """
        `log Z`: mean of `exp(Phi/beta)` over the ranks that prior samples have among each other.

        Without ties these ranks are `(i - 1/2)/n`, whatever the rewards are, so this is the integral of
        `exp(Phi(u)/beta)` over (0, 1) by the midpoint rule: the closed form up to `O(1/n^2)`, without noise and the
        same for every prompt. Ties make it an estimate, which is said once.
        """
        prior = self.table.lookup(keys)  # (P, n)
        count = prior.isfinite().sum(dim=1, keepdim=True)
        if not self._looked_for_ties:
            self._looked_for_ties = True
            if (tied := self.diagnostics()["calibrated/tied_frac"]) > 0:
                warnings.warn(
                    f"{tied:.1%} of the prior samples share their reward with another of the same prompt, so the "
                    "evidence of `Calibrated` has no closed form: `log Z` is estimated from the prior samples.",
                    stacklevel=2,
                )
        less, less_or_equal = _ranks(prior, prior)
        u = (less + less_or_equal) / 2 / count
        phi = (self.transform(u) / self.beta).masked_fill(prior.isinf(), -math.inf)
        return torch.where(count > 0, phi.logsumexp(dim=1, keepdim=True) - count.log(), torch.nan).squeeze(1)

    def diagnostics(self) -> dict[str, float]:
        if not self.is_fitted:
            return {}
        prior = self.table.values
        equal_to_next = (prior[:, 1:] == prior[:, :-1]) & prior[:, 1:].isfinite()
        tied = torch.nn.functional.pad(equal_to_next, (0, 1)) | torch.nn.functional.pad(equal_to_next, (1, 0))
        return {"calibrated/tied_frac": (tied.sum() / prior.isfinite().sum()).item()}

    def settings(self) -> dict[str, Any]:
        return {"transform": self.transform, "beta": self.beta, **super().settings()}


def _ranks(ascending: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of each row `(..., n)` are less than, and at most, its values `(..., M)`; float64, shape `(..., M)`."""
    less, less_or_equal = (torch.searchsorted(ascending, values, right=right) for right in (False, True))
    return less.double(), less_or_equal.double()
