"""Several pieces of evidence at once."""

from collections.abc import Sequence
from typing import Any

import torch

from ..prior import Context, PriorScores
from .base import Target


class Product(Target):
    """
    A product of experts: all the evidence of its factors, `phi = sum_i phi_i`.

    For example a hard constraint and a preference,
    `Product([Constraint(rewards="compiles"), Tilt(beta=0.1, rewards="quality")])`. A factor without any reward for a
    completion adds nothing to it; a completion that no factor which reads rewards can score is left out of the update.

    A factor that learns from the prior learns what it would learn alone (quantiles, references, thresholds are the
    prior's). Only [`Moments`] are fitted under the evidence of all other factors, because they say what holds for the
    product.

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
        self.reads_rewards = any(factor.reads_rewards for factor in self.factors)
        self.needs_context = any(factor.needs_context for factor in self.factors)
        self.needs_prior_samples = any(factor.needs_prior_samples for factor in self.factors)
        fitted_last = [factor for factor in self.factors if factor.fits_under_others]
        self.fits_under_others = bool(fitted_last)
        if len(fitted_last) > 1:
            raise ValueError(
                f"`Product` takes one factor that is fitted under the others, got {fitted_last}: give all moments to "
                "one `Moments`."
            )

    def bind(self, reward_names: Sequence[str], reward_weights: torch.Tensor | None = None) -> None:
        for factor in self.factors:
            factor.bind(reward_names, reward_weights)

    def log_potential(self, rewards: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        phi, scored = _combine(self.factors, [factor(rewards, context) for factor in self.factors])
        return phi.masked_fill(~scored, torch.nan) if self.reads_rewards else phi

    def fit(self, prior: PriorScores) -> None:
        for factor in self.factors:
            if factor.needs_prior_samples and not factor.fits_under_others:
                factor.fit(prior)
        for factor in self.factors:
            if factor.fits_under_others:
                others = [other for other in self.factors if other is not factor]
                evidence = [prior.log_potential(other) for other in others]
                factor.fit(prior.with_evidence(*_combine(others, evidence)) if others else prior)

    @property
    def is_fitted(self) -> bool:
        return all(factor.is_fitted for factor in self.factors)

    def log_z(self, keys: torch.Tensor) -> torch.Tensor | None:
        """Known for a single factor only: the evidence of several does not follow from that of each."""
        return self.factors[0].log_z(keys) if len(self.factors) == 1 else None

    def diagnostics(self) -> dict[str, float]:
        """Those of the factors; where two have the same name, the later one's is preceded by its place."""
        merged: dict[str, float] = {}
        for i, factor in enumerate(self.factors):
            for name, value in factor.diagnostics().items():
                merged[f"{i}/{name}" if name in merged else name] = value
        return merged

    def settings(self) -> dict[str, Any]:
        return {"factors": self.factors}

    def state_dict(self) -> dict[str, Any]:
        return {str(i): factor.state_dict() for i, factor in enumerate(self.factors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, factor in enumerate(self.factors):
            factor.load_state_dict(state[str(i)])


def _combine(factors: Sequence[Target], each: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the factors' evidence, where missing evidence adds nothing, and which completions a reward scores."""
    scored = torch.zeros_like(each[0], dtype=torch.bool)
    for factor, phi in zip(factors, each, strict=True):
        if factor.reads_rewards:
            scored |= ~phi.isnan()
    return torch.stack(list(each)).nansum(dim=0), scored
