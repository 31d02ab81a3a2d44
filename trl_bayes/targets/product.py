"""Several targets at once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..language_models.completions import Prompt
from ..prior import Context, PriorScores
from .base import Target
from .build import build_target


class Product(Target):
    """
    A product of experts: the log-potentials of its factors added up, `phi = sum_i phi_i`.

    For example a hard constraint and a preference,
    `Product([Constraint(rewards="compiles"), Tilt(beta=0.1, rewards="quality")])`. A factor without any reward for a
    completion adds nothing to it; a completion that no factor which reads rewards can score is left out of the update.

    A factor that learns from the prior learns what it would learn alone (quantiles, references, thresholds are the
    prior's). Only [`Moments`] are fitted under the log-potentials of all other factors, because they say what holds
    for the product.

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
        bounded = [factor.learns_its_bound or factor.max_log_potential() is not None for factor in self.factors]
        self.learns_its_bound = all(bounded) and any(factor.learns_its_bound for factor in self.factors)
        fitted_last = [factor for factor in self.factors if factor.fits_under_others]
        self.fits_under_others = bool(fitted_last)
        if len(fitted_last) > 1:
            raise ValueError(
                f"`Product` takes one factor that is fitted under the others, got {fitted_last}: give all moments to "
                "one `Moments`."
            )

    @classmethod
    def arguments_from_config(cls, given: Mapping[str, Any], beta: float | None) -> dict[str, Any]:
        return {**given, "factors": [build_target(factor, beta) for factor in given.get("factors", [])]}

    def bind(self, reward_names: Sequence[str], reward_weights: torch.Tensor | None = None) -> None:
        for factor in self.factors:
            factor.bind(reward_names, reward_weights)

    def names_read(self) -> list[str]:
        return [name for factor in self.factors for name in factor.names_read()]

    def log_potential(self, rewards: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        phi, scored = _combine(self.factors, [factor(rewards, context) for factor in self.factors])
        return phi.masked_fill(~scored, torch.nan) if self.reads_rewards else phi

    def max_log_potential(self) -> float | None:
        """The sum of the factors' bounds, if each has one."""
        total = 0.0
        for factor in self.factors:
            bound = factor.max_log_potential()
            if bound is None:
                return None
            # A factor without any reward for a completion adds nothing to it, which may be more than its bound
            total += max(bound, 0.0) if factor.reads_rewards and len(self.factors) > 1 else bound
        return total

    def partial_log_potential(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> torch.Tensor:
        """The sum over the factors, of which most say nothing."""
        each = [torch.as_tensor(factor.partial_log_potential(prompts, texts)) for factor in self.factors]
        return torch.stack(each).sum(dim=0)

    @property
    def guesses_early(self) -> bool:
        return any(factor.guesses_early for factor in self.factors)

    def warn_of_too_few_samples(self, num_samples: int) -> None:
        for factor in self.factors:
            factor.warn_of_too_few_samples(num_samples)

    def fit(self, prior: PriorScores) -> None:
        for factor in self.factors:
            if factor.needs_prior_samples and not factor.fits_under_others:
                factor.fit(prior)
        for factor in self.factors:
            if factor.fits_under_others:
                others = [other for other in self.factors if other is not factor]
                each = [prior.log_potential(other) for other in others]
                factor.fit(prior.under(*_combine(others, each)) if others else prior)

    @property
    def is_fitted(self) -> bool:
        return all(factor.is_fitted for factor in self.factors)

    def log_z(self, keys: torch.Tensor) -> torch.Tensor | None:
        """Known for a single factor only: the `Z` of several does not follow from that of each."""
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
    """The sum of the factors' `phi`, where a missing one adds nothing, and which completions a reward scores."""
    scored = torch.zeros_like(each[0], dtype=torch.bool)
    for factor, phi in zip(factors, each, strict=True):
        if factor.reads_rewards:
            scored |= ~phi.isnan()
    return torch.stack(list(each)).nansum(dim=0), scored
