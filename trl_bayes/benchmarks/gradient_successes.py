"""Rewards of 0 and 1 at the prior: the squared error of a gradient by summing over how many of a group succeed."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import get_divergence
from ..estimators import Estimator, ImportanceWeights, ScoreFunction
from ..groups import Group, pooled_log_z
from ..partitions import LeaveOneOut, LogZ, fixed_log_z


RATES = (0.01, 0.05, 0.1, 0.2)
"""Share of successes of the prior."""

PHI = 10.0
"""Of a success: a reward of 1 at `beta = 0.1`."""


class SquaredError(NamedTuple):
    """Of the gradient in the log-odds of a success, from one group."""

    squared_bias: float
    variance: float

    def of(self, groups: int = 1) -> float:
        """Of the mean of several groups of one prompt."""
        return self.squared_bias + self.variance / groups


_Rule = Callable[[Group, float], LogZ]

RULES: dict[str, _Rule] = {
    "at least 3/4 of the group's Z (ours)": lambda group, log_z: LeaveOneOut().log_z(group),
    "the group's own Z": lambda group, log_z: fixed_log_z(pooled_log_z(group.log_weights, group.valid), group),
}
"""How the trainers find Z at a prompt's first visit, and the plainest other way."""


def known(group: Group, log_z: float) -> LogZ:
    """The true Z."""
    return fixed_log_z(torch.full((len(group.phi),), log_z, dtype=torch.float64), group)


def squared_error(estimator: Estimator, rate: float, rule: _Rule, group_size: int = 16) -> SquaredError:
    """
    Exactly, on-policy at the prior, over all numbers of successes in a group.

    Args:
        estimator ([`~trl_bayes.estimators.Estimator`]): of the gradient.
        rate (`float`): share of successes.
        rule (`Callable`): gives `log Z` of groups, from these and the true one.
        group_size (`int`, *optional*, defaults to `16`): completions of a group.
    """
    numbers = range(group_size + 1)
    succeeds = torch.arange(group_size) < torch.arange(group_size + 1).unsqueeze(1)  # (G + 1, G)
    chance = [math.comb(group_size, k) * rate**k * (1 - rate) ** (group_size - k) for k in numbers]
    log_z = math.log(rate * math.exp(PHI) + 1 - rate)
    found = _gradients(estimator, succeeds, rate, rule, log_z)  # (G + 1,)
    # With the true Z a completion of its own weighs as in any group: the mean is the exact gradient
    exact = _mean(_gradients(estimator, succeeds, rate, known, log_z), chance)
    mean = _mean(found, chance)
    return SquaredError((mean - exact) ** 2, _mean((found - mean).square(), chance))


def _gradients(estimator: Estimator, succeeds: Tensor, rate: float, rule: _Rule, log_z: float) -> Tensor:
    log_prior = torch.where(succeeds, math.log(rate), math.log(1 - rate)).double()
    phi = torch.where(succeeds, PHI, 0.0).double()
    group = Group(log_prior, log_prior, log_prior, phi)
    terms = estimator.terms(group, rule(group, log_z))
    score = succeeds.double() - rate  # grad log pi in the log-odds
    return -(terms.advantages * score).mean(dim=1)


def _mean(values: Tensor, chance: Sequence[float]) -> float:
    return float((values * torch.tensor(chance, dtype=torch.float64)).sum())


def table() -> str:
    """A row per estimator and rule: errors over those with the true Z, for one group and for 16 of one prompt."""
    estimators: dict[str, Estimator] = {
        "DPG": ImportanceWeights(get_divergence("forward_kl")),
        "Jensen-Shannon": ScoreFunction(get_divergence("jensen_shannon")),
    }
    lines = [
        f"| estimator | Z | {' | '.join(f'success rate {rate:g}' for rate in RATES)} |",
        f"|---|---|{'---|' * len(RATES)}",
    ]
    for name, estimator in estimators.items():
        for rule, log_z in RULES.items():
            pairs = [(squared_error(estimator, rate, log_z), squared_error(estimator, rate, known)) for rate in RATES]
            cells = [f"{ours.of() / best.of():.2f} ({ours.of(16) / best.of(16):.2f})" for ours, best in pairs]
            lines.append(f"| {name} | {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)
