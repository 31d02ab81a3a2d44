"""Rewards of 0 and 1 at the prior: the squared error of a gradient by summing over how many of a group succeed."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import get_divergence
from ..estimators import Estimator, ImportanceWeights, ScoreFunction
from ..groups import Group, pooled_log_z
from ..partitions import FromPriorSamples, LeaveOneOut, LogZ, fixed_log_z
from ..prior import PriorScores, log_z_from_prior
from ..targets import Tilt
from .tables import markdown_table


RATES = (0.01, 0.05, 0.1, 0.2)
"""Share of successes of the prior."""

PHI = 10.0
"""Of a success: a reward of 1 at `beta = 0.1`."""

_GROUP_SIZE = 16


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


def squared_error(estimator: Estimator, rate: float, rule: _Rule, group_size: int = _GROUP_SIZE) -> SquaredError:
    """
    Exactly, on-policy at the prior, over all numbers of successes in a group.

    Args:
        estimator ([`~trl_bayes.estimators.Estimator`]): of the gradient.
        rate (`float`): share of successes.
        rule (`Callable`): gives `log Z` of groups, from these and the true one.
        group_size (`int`, *optional*, defaults to `16`): completions of a group.
    """
    return _error(estimator, rate, [(1.0, rule)], group_size)


def squared_error_by_samples(
    estimator: Estimator, rate: float, is_bounded: bool = True, number: int = 100
) -> SquaredError:
    """
    The same where `Z` comes from samples of the prior, over all numbers of successes among these too.

    Args:
        estimator ([`~trl_bayes.estimators.Estimator`]), rate (`float`): as of [`squared_error`].
        is_bounded (`bool`, *optional*, defaults to `True`): whether `Z` is that of
            [`~trl_bayes.partitions.FromPriorSamples`], or only the samples' mean.
        number (`int`, *optional*, defaults to `100`): samples of the prior.
    """
    chance = _binomial(number, rate)
    likely = [(each, k) for k, each in enumerate(chance) if each > 1e-12]
    return _error(estimator, rate, [(each, _by_samples(k, number, is_bounded)) for each, k in likely], _GROUP_SIZE)


def _by_samples(successes: int, number: int, is_bounded: bool) -> _Rule:
    rewards = (torch.arange(number) < successes).double().view(1, number, 1)
    scores, target = PriorScores(rewards, torch.zeros(1, number), torch.zeros(1, dtype=torch.int64)), Tilt(1 / PHI)
    target.bind(["success"], None)
    partition = FromPriorSamples()
    partition.learn(scores, target)
    samples_z = log_z_from_prior(scores.log_potential(target))

    def rule(group: Group, log_z: float) -> LogZ:
        groups = len(group.phi)
        if is_bounded:
            return partition.log_z(group._replace(prompt_keys=torch.zeros(groups, dtype=torch.int64)))
        return fixed_log_z(samples_z.expand(groups), group)

    return rule


def _error(estimator: Estimator, rate: float, rules: Sequence[tuple[float, _Rule]], group_size: int) -> SquaredError:
    """Over all groups, and over several rules with the probability of each."""
    succeeds = torch.arange(group_size) < torch.arange(group_size + 1).unsqueeze(1)  # (G + 1, G)
    chance = _binomial(group_size, rate)
    log_z = math.log(rate * math.exp(PHI) + 1 - rate)
    # With the true Z a completion of its own weighs as in any group: the mean is the exact gradient
    exact = _mean(_gradients(estimator, succeeds, rate, known, log_z), chance)
    found = [(each, _gradients(estimator, succeeds, rate, rule, log_z)) for each, rule in rules]  # of (G + 1,)
    mean = sum(each * _mean(values, chance) for each, values in found)
    variance = sum(each * _mean((values - mean).square(), chance) for each, values in found)
    return SquaredError((mean - exact) ** 2, variance)


def _binomial(number: int, rate: float) -> list[float]:
    """The probability of each number of successes."""
    return [math.comb(number, k) * rate**k * (1 - rate) ** (number - k) for k in range(number + 1)]


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
    lines = []
    for name, estimator in estimators.items():
        best = [squared_error(estimator, rate, known) for rate in RATES]
        errors = {rule: [squared_error(estimator, rate, log_z) for rate in RATES] for rule, log_z in RULES.items()}
        for rule, is_bounded, number in (
            ("100 samples of the prior (ours)", True, 100),
            ("1,000 samples of the prior (ours)", True, 1000),
            ("100 samples of the prior alone", False, 100),
        ):
            errors[rule] = [squared_error_by_samples(estimator, rate, is_bounded, number) for rate in RATES]
        for rule, found in errors.items():
            pairs = zip(found, best, strict=True)
            cells = [f"{each.of() / least.of():.3g} ({each.of(16) / least.of(16):.3g})" for each, least in pairs]
            lines.append([name, rule, *cells])
    return markdown_table(["estimator", "Z", *(f"success rate {rate:g}" for rate in RATES)], lines)
