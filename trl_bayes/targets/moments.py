"""Distributional constraints: the distribution nearest the prior whose features have given means."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..prior import PriorScores
from .base import Target


_TOLERANCE = 1e-8  # of the achieved moments, in units of each feature's standard deviation under the prior
_FLAT = 1e-10  # variance of a direction of unit prior variance that counts as none
_EDGE = 1e-6  # ratio of posterior to prior variance below which the posterior has lost a direction
_MAX_CHANGE = 10.0  # of a sample's log-weight in one step: beyond, the quadratic model says nothing
_MAX_ITERATIONS = 1000
_MIN_SAMPLES = 100  # effective ones: the mean of a 0/1 feature then has a standard error of 0.05


class Moments(Target):
    r"""
    Distributional control: `phi = sum_k lambda_k (f_k - mu_k)` with `lambda` such that `E_x E_{p(y|x)}[f_k] = mu_k`.

    Of all distributions with these moments, `p` is the nearest to the prior in `KL(p||pi_0)`. Features are reward
    functions, 0 or 1 or real: `Moments({"female": 0.5, "science": 0.4})` asks that half of the completions are about
    women. See [A Distributional Approach to Controlled Text Generation](https://huggingface.co/papers/2012.11635).

    `lambda` minimizes the convex dual `E_x log E_{pi_0(y|x)}[exp(lambda . (f - mu))]` over prior samples: the mean
    over prompts of `log Z(x)`, and not the `log Z` of all samples pooled, which would weigh prompts by their `Z(x)`.
    There is one `lambda` for all prompts, and all prompts weigh the same in the moments, as they do in training: a
    prompt may be off if others make up for it. Subtracting `mu` changes `Z` and not `p`, and makes a feature that does
    not apply to a completion (`NaN`) neutral: the moment is the mean over completions to which it applies.

    In a [`Product`] with other targets it is the product whose moments are `mu`: `lambda` is fitted under the evidence
    of the others, so `Product([Constraint("valid"), Moments({"female": 0.5})])` has half of the *valid* ones about
    women.

    Args:
        mu (`dict[str, float]`): the mean that each feature, named as its reward function, is to have.
    """

    needs_prior_samples = True
    fits_under_others = True

    def __init__(self, mu: Mapping[str, float]):
        if not isinstance(mu, Mapping) or not mu:
            raise ValueError(f"`Moments` needs a mapping of feature names to moments, {{'female': 0.5}}, got {mu!r}.")
        super().__init__(list(mu))
        for name, value in mu.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"`Moments` needs a finite number as the moment of {name!r}, got {value!r}.")
        self.mu = {name: float(value) for name, value in mu.items()}
        self._lambda: torch.Tensor | None = None  # (K',) float64
        self._diagnostics: dict[str, float] = {}

    def log_potential(self, rewards: torch.Tensor) -> torch.Tensor:
        self.require_fitted()
        assert self._lambda is not None
        centered = self._centered(rewards)  # (N, K')
        phi = (centered * self._lambda.to(rewards.device)).nansum(dim=1)
        return phi.masked_fill(centered.isnan().all(dim=1), torch.nan).to(rewards.dtype)

    def fit(self, prior: PriorScores) -> None:
        """
        Finds `lambda` by Newton's method on prior samples, weighted by `prior.log_weights`.

        Raises:
            ValueError: moments that no distribution over the prior samples has, naming the features.
        """
        num_prompts, num_samples, _ = prior.rewards.shape
        centered = self._centered(prior.rewards.flatten(0, 1)).view(num_prompts, num_samples, -1)  # (P, N, K')
        log_base = torch.zeros_like(centered[..., 0]) if prior.log_weights is None else prior.log_weights.double()
        unscored = centered.isnan().all(dim=2)  # by this target; if nobody else can, left out here as in training
        log_base = log_base.masked_fill(unscored if prior.scored is None else unscored & ~prior.scored, -math.inf)
        usable = (log_base > -math.inf).any(dim=1)
        if not usable.any():
            raise ValueError(
                f"No sample of the prior has both a feature of {self!r} and the evidence of the other factors of the "
                "product: draw more prior samples, or ask for less."
            )
        centered, log_base = centered[usable].nan_to_num(nan=0.0), log_base[usable]
        names = list(self.mu)
        _refuse_unreachable(names, self.mu, centered, log_base)
        self._lambda = _minimize_dual(names, self.mu, centered, log_base)
        self._diagnostics = self._describe(centered, log_base)
        if (effective := self._diagnostics["moments/effective_samples"]) < _MIN_SAMPLES:
            warnings.warn(
                f"The moments of {self!r} rest on {effective:.0f} effective samples of the prior: draw more, or what "
                "the policy is trained towards may miss them.",
                stacklevel=2,
            )

    def _centered(self, rewards: torch.Tensor) -> torch.Tensor:
        """`f - mu` of the features, `(N, K')` float64; infinite ones count as missing."""
        features = self.select(rewards).double()
        return features.masked_fill(features.isinf(), torch.nan) - features.new_tensor(list(self.mu.values()))

    def _describe(self, centered: torch.Tensor, log_base: torch.Tensor) -> dict[str, float]:
        assert self._lambda is not None
        weight = (log_base + centered @ self._lambda).softmax(dim=1)  # (P, N)
        effective = 1 / weight.square().sum(dim=1)  # (P,)
        achieved = _mean(weight, centered)
        before = _mean(log_base.softmax(dim=1), centered)
        numbers = {
            "moments/ess": (effective / (log_base > -math.inf).sum(dim=1)).mean().item(),
            "moments/effective_samples": effective.sum().item(),
        }
        for k, (name, mu) in enumerate(self.mu.items()):
            numbers[f"moments/{name}"] = mu + achieved[k].item()
            numbers[f"moments/{name}/before"] = mu + before[k].item()
            numbers[f"moments/{name}/lambda"] = self._lambda[k].item()
        return numbers

    def diagnostics(self) -> dict[str, float]:
        """
        Per feature its achieved moment, the moment `before` (under the prior and the other factors) and its `lambda`;
        the effective sample size `moments/ess` as a fraction of a prompt's samples, averaged over prompts, and
        `moments/effective_samples` as a number, summed over them.
        """
        return dict(self._diagnostics)

    @property
    def is_fitted(self) -> bool:
        return self._lambda is not None

    def settings(self) -> dict[str, Any]:
        return {"mu": self.mu}

    def state_dict(self) -> dict[str, Any]:
        return {} if self._lambda is None else {"lambda": self._lambda, "diagnostics": dict(self._diagnostics)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lambda = state["lambda"] if state else None
        self._diagnostics = dict(state["diagnostics"]) if state else {}


def _mean(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`E_x E_w[values]`, `(K,)`, of values `(P, N, K)` under weights `(P, N)` that sum to one for each prompt."""
    return torch.einsum("pn,pnk->k", weight, values) / weight.size(0)


def _covariance(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`E_x Cov_w(values)`, `(K, K)`: the mean over prompts of the covariance within each."""
    centered = values - torch.einsum("pn,pnk->pk", weight, values).unsqueeze(1)
    return torch.einsum("pn,pnk,pnl->kl", weight, centered, centered) / weight.size(0)


def _extremes(values: torch.Tensor, log_base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest mean over prompts that weights on the base's support can give `(P, N, K)`: `(K,)`."""
    outside = (log_base == -math.inf).unsqueeze(2)
    lowest = values.masked_fill(outside, math.inf).amin(dim=1).mean(dim=0)
    return lowest, values.masked_fill(outside, -math.inf).amax(dim=1).mean(dim=0)


def _refuse_unreachable(
    names: Sequence[str], mu: Mapping[str, float], centered: torch.Tensor, log_base: torch.Tensor
) -> None:
    """Looks at each feature alone, so that the commonest mistakes get the plainest message."""
    lowest, highest = _extremes(centered, log_base)
    for k, name in enumerate(names):
        low, high = mu[name] + lowest[k].item(), mu[name] + highest[k].item()
        if highest[k] - lowest[k] <= 1e-12 * (1 + abs(low)):
            raise ValueError(
                f"The feature {name!r} never varies among the prior samples of a prompt (its mean is {low:.4g}), so "
                f"no target can give it the moment {mu[name]:.4g}: draw more prior samples, or leave it out."
            )
        if not lowest[k] < 0 < highest[k]:
            raise ValueError(
                f"`Moments` cannot reach {name!r} = {mu[name]:.4g}: the prior samples allow means between {low:.4g} "
                f"and {high:.4g}, both excluded. Choose one in between, or draw more prior samples; for a feature "
                "that must always hold, use `Constraint`."
            )


def _refuse_together(names: Sequence[str], mu: Mapping[str, float], direction: torch.Tensor) -> None:
    """Raises for a direction `(K,)` in feature space, in units of standard deviations, that cannot be reached."""
    involved = [name for name, part in zip(names, direction, strict=True) if part.abs() > 0.05 * direction.abs().max()]
    asked = " and ".join(f"{name!r} = {mu[name]:.4g}" for name in involved)
    raise ValueError(
        f"`Moments` cannot reach {asked} together: no weighting of the prior samples has these means. Choose moments "
        "that go together, or draw more prior samples."
    )


def _simplest(direction: torch.Tensor, values: torch.Tensor, log_base: torch.Tensor) -> torch.Tensor:
    """A direction `(K,)` along which values `(P, N, K)` cannot reach 0, with as few features as possible."""
    for k in direction.abs().argsort():
        without = direction.index_fill(0, k, 0.0)
        _, highest = _extremes((values @ without).unsqueeze(2), log_base)
        if without.any() and highest.item() <= 0:
            direction = without
    return direction


def _minimize_dual(
    names: Sequence[str], mu: Mapping[str, float], centered: torch.Tensor, log_base: torch.Tensor
) -> torch.Tensor:
    """
    `argmin_lambda E_x log E_base[exp(lambda . (f - mu))]`, `(K,)`, by Newton's method with a backtracking line search.

    Gradient `E_x E_p[f - mu]`, Hessian `E_x Cov_p(f)`. Features are first turned into directions of unit variance,
    which leaves out those that never vary (a feature and its complement: any `lambda` along them gives the same `p`).
    The moments are out of reach, exactly, if some `lambda` has `E_x max_y lambda . (f - mu) <= 0`; and on the edge of
    what is in reach if the posterior loses a direction.
    """
    base = log_base.log_softmax(dim=1)
    scale = _covariance(base.exp(), centered).diagonal().sqrt()  # (K,)
    correlation = _covariance(base.exp(), centered / scale)
    variances, directions = torch.linalg.eigh(correlation)
    varies = variances > _FLAT * len(names)
    mean = _mean(base.exp(), centered / scale)
    for direction in directions[:, ~varies].T:
        if (direction @ mean).abs() > 1e-6:
            _refuse_together(names, mu, direction)
    to_unit = directions[:, varies] / variances[varies].sqrt() / scale.unsqueeze(1)  # (K, R)
    unit = centered @ to_unit  # (P, N, R), of unit covariance under the base

    def dual(step: torch.Tensor) -> torch.Tensor:
        return (base + unit @ step).logsumexp(dim=1).mean()

    theta = unit.new_zeros(unit.size(2))
    for _ in range(_MAX_ITERATIONS):
        weight = (base + unit @ theta).softmax(dim=1)
        gradient, hessian = _mean(weight, unit), _covariance(weight, unit)
        if gradient.abs().max() <= _TOLERANCE:
            break
        step = -torch.linalg.lstsq(hessian, gradient.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        if not gradient @ step < 0:  # the Hessian has vanished: only far outside what can be reached
            step = -gradient
        step = step * (_MAX_CHANGE / (unit @ step).abs().max()).clamp(max=1.0)
        length, here, descent = 1.0, dual(theta), gradient @ step
        # Rounding ends the search where the gain has become too small to be seen
        while not dual(theta + length * step) <= here + 1e-4 * length * descent + 1e-15 and length > 1e-10:
            length /= 2
        theta = theta + length * step
        _, highest = _extremes((unit @ theta).unsqueeze(2), log_base)
        if highest.item() <= 0:
            _refuse_together(names, mu, _simplest((to_unit @ theta) * scale, centered / scale, log_base))
    else:
        raise ValueError(
            f"The moments {dict(mu)} were not found in {_MAX_ITERATIONS} steps of Newton's method: they are at the "
            "edge of what the prior samples allow, or a feature has extreme outliers; choose others, or bound it."
        )
    smallest, edge = torch.linalg.eigh(_covariance((base + unit @ theta).softmax(dim=1), unit))
    if smallest[0] < _EDGE:
        _refuse_together(names, mu, (to_unit @ edge[:, 0]) * scale)
    return to_unit @ theta
