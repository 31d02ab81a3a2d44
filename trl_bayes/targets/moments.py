"""Distributional constraints: the distribution nearest the prior whose features have given means."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    There is one `lambda` for all prompts, and `E_x` is over the training data: a prompt counts as often as it occurs
    there (`PriorScores.multiplicity`), and one of the evaluation alone does not. A prompt may be off if others make up
    for it. Subtracting `mu` changes `Z` and not `p`, and makes a feature that does not apply to a completion (`NaN`)
    neutral: the moment is the mean over completions to which it applies.

    In a [`Product`] with other targets it is the product whose moments are `mu`: `lambda` is fitted under the
    log-potentials of the others, so `Product([Constraint("valid"), Moments({"female": 0.5})])` has half of the *valid*
    ones about women.

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
        usable = (log_base > -math.inf).any(dim=1) & (prior.multiplicity > 0)
        if not usable.any():
            raise ValueError(
                f"No sample of the prior has both a feature of {self!r} and what the other factors of the product ask "
                "for: draw more prior samples, or ask for less."
            )
        share = prior.multiplicity[usable] / prior.multiplicity[usable].sum()
        features = _Features(self.mu, centered[usable].nan_to_num(nan=0.0), log_base[usable], share)
        _refuse_unreachable(features)
        self._lambda = _minimize_dual(features)
        self._diagnostics = self._describe(features)
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

    def _describe(self, features: "_Features") -> dict[str, float]:
        assert self._lambda is not None
        weight = (features.log_base + features.centered @ self._lambda).softmax(dim=1)  # (P, N)
        effective = 1 / weight.square().sum(dim=1)  # (P,)
        achieved = _mean(weight, features.centered, features.share)
        before = _mean(features.log_base.softmax(dim=1), features.centered, features.share)
        ess = effective / (features.log_base > -math.inf).sum(dim=1)
        numbers = {
            "moments/ess": (features.share @ ess).item(),
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
        the effective sample size `moments/ess` as a fraction of a prompt's samples, averaged over the training data,
        and `moments/effective_samples` as a number, summed over its prompts.
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


class _Features(NamedTuple):
    """What `lambda` is fitted to: the samples of `P` prompts of the training data."""

    mu: Mapping[str, float]
    centered: torch.Tensor  # (P, N, K'): f - mu, 0 where a feature does not apply
    log_base: torch.Tensor  # (P, N): log-potential of the other factors; -inf for a sample that is left out
    share: torch.Tensor  # (P,): of the training data, summing to one


def _mean(weight: torch.Tensor, values: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """`E_x E_w[values]`, `(K,)`, of values `(P, N, K)` under weights `(P, N)` that sum to one for each prompt."""
    return torch.einsum("p,pn,pnk->k", share, weight, values)


def _covariance(weight: torch.Tensor, values: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """`E_x Cov_w(values)`, `(K, K)`: the mean over prompts of the covariance within each."""
    centered = values - torch.einsum("pn,pnk->pk", weight, values).unsqueeze(1)
    return torch.einsum("p,pn,pnk,pnl->kl", share, weight, centered, centered)


def _extremes(values: torch.Tensor, log_base: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest mean over prompts that weights on the base's support can give `(P, N, K)`: `(K,)`."""
    outside = (log_base == -math.inf).unsqueeze(2)
    lowest = share @ values.masked_fill(outside, math.inf).amin(dim=1)
    return lowest, share @ values.masked_fill(outside, -math.inf).amax(dim=1)


def _refuse_unreachable(features: _Features) -> None:
    """Looks at each feature alone, so that the commonest mistakes get the plainest message."""
    lowest, highest = _extremes(features.centered, features.log_base, features.share)
    for k, (name, mu) in enumerate(features.mu.items()):
        low, high = mu + lowest[k].item(), mu + highest[k].item()
        if highest[k] - lowest[k] <= 1e-12 * (1 + abs(low)):
            raise ValueError(
                f"The feature {name!r} never varies among the prior samples of a prompt (its mean is {low:.4g}), so "
                f"no target can give it the moment {mu:.4g}: draw more prior samples, or leave it out."
            )
        if not lowest[k] < 0 < highest[k]:
            raise ValueError(
                f"`Moments` cannot reach {name!r} = {mu:.4g}: the prior samples allow means between {low:.4g} "
                f"and {high:.4g}, both excluded. Choose one in between, or draw more prior samples; for a feature "
                "that must always hold, use `Constraint`."
            )


def _refuse_together(mu: Mapping[str, float], direction: torch.Tensor) -> None:
    """Raises for a direction `(K,)` in feature space, in units of standard deviations, that cannot be reached."""
    involved = [name for name, part in zip(mu, direction, strict=True) if part.abs() > 0.05 * direction.abs().max()]
    asked = " and ".join(f"{name!r} = {mu[name]:.4g}" for name in involved)
    raise ValueError(
        f"`Moments` cannot reach {asked} together: no weighting of the prior samples has these means. Choose moments "
        "that go together, or draw more prior samples."
    )


def _simplest(direction: torch.Tensor, values: torch.Tensor, features: _Features) -> torch.Tensor:
    """A direction `(K,)` along which values `(P, N, K)` cannot reach 0, with as few features as possible."""
    for k in direction.abs().argsort():
        without = direction.index_fill(0, k, 0.0)
        _, highest = _extremes((values @ without).unsqueeze(2), features.log_base, features.share)
        if without.any() and highest.item() <= 0:
            direction = without
    return direction


def _minimize_dual(features: _Features) -> torch.Tensor:
    """
    `argmin_lambda E_x log E_base[exp(lambda . (f - mu))]`, `(K,)`, by Newton's method with a backtracking line search.

    Gradient `E_x E_p[f - mu]`, Hessian `E_x Cov_p(f)`. Features are first turned into directions of unit variance,
    which leaves out those that never vary (a feature and its complement: any `lambda` along them gives the same `p`).
    The moments are out of reach, exactly, if some `lambda` has `E_x max_y lambda . (f - mu) <= 0`; and on the edge of
    what is in reach if the posterior loses a direction.
    """
    mu, centered, log_base, share = features
    base = log_base.log_softmax(dim=1)
    scale = _covariance(base.exp(), centered, share).diagonal().sqrt()  # (K,)
    to_unit = _unit_directions(mu, base.exp(), centered / scale, share) / scale.unsqueeze(1)  # (K, R)
    unit = centered @ to_unit  # (P, N, R), of unit covariance under the base

    def dual(step: torch.Tensor) -> torch.Tensor:
        return share @ (base + unit @ step).logsumexp(dim=1)

    theta = unit.new_zeros(unit.size(2))
    for _ in range(_MAX_ITERATIONS):
        weight = (base + unit @ theta).softmax(dim=1)
        gradient, hessian = _mean(weight, unit, share), _covariance(weight, unit, share)
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
        _, highest = _extremes((unit @ theta).unsqueeze(2), log_base, share)
        if highest.item() <= 0:
            _refuse_together(mu, _simplest((to_unit @ theta) * scale, centered / scale, features))
    else:
        raise ValueError(
            f"The moments {dict(mu)} were not found in {_MAX_ITERATIONS} steps of Newton's method: they are at the "
            "edge of what the prior samples allow, or a feature has extreme outliers; choose others, or bound it."
        )
    smallest, edge = torch.linalg.eigh(_covariance((base + unit @ theta).softmax(dim=1), unit, share))
    if smallest[0] < _EDGE:
        _refuse_together(mu, (to_unit @ edge[:, 0]) * scale)
    return to_unit @ theta


def _unit_directions(
    mu: Mapping[str, float], weight: torch.Tensor, scaled: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """Combinations of features `(K, R)` of unit variance each and uncorrelated, without those that never vary."""
    variances, directions = torch.linalg.eigh(_covariance(weight, scaled, share))
    varies = variances > _FLAT * len(mu)
    mean = _mean(weight, scaled, share)
    for direction in directions[:, ~varies].T:
        if (direction @ mean).abs() > 1e-6:
            _refuse_together(mu, direction)
    return directions[:, varies] / variances[varies].sqrt()
