"""A space of five outcomes on which everything can be summed: exact gradients, and the mean of an estimator's.

The policy is a softmax over five free logits, so `grad log pi(y) = onehot(y) - pi`, and every exact gradient is
autograd through the definition `D_f(pi||p) = sum_y p f(pi/p)`, with f written out as in a textbook.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.helpers import textbook
from trl_bayes.divergences import Divergence, get_divergence
from trl_bayes.estimators import Estimator, Sequences
from trl_bayes.groups import Group
from trl_bayes.partitions import fixed_log_z


INF = math.inf
NUM_OUTCOMES = 5


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


ZERO, ONE = vector(0.0)[0], vector(1.0)[0]

THETA = vector(0.3, -0.5, 0.8, 0.0, -1.1)  # the policy's logits
LOG_POLICY = THETA.log_softmax(0)
LOG_PRIOR = vector(-0.2, 0.7, 0.1, -0.9, 0.4).log_softmax(0)
OTHER_PROPOSAL = vector(0.5, 0.9, -0.7, 0.4, 0.2).log_softmax(0)  # an earlier policy: neither pi nor pi_0
PROPOSALS = {"on_policy": LOG_POLICY, "off_policy": OTHER_PROPOSAL}


class Space(NamedTuple):
    """What is to be approximated, over all outcomes, each `(N,)`; `log_z` is exact."""

    log_target: Tensor
    log_posterior: Tensor
    log_z: Tensor


def space(phi: Tensor) -> Space:
    log_target = LOG_PRIOR + phi
    log_z = log_target.logsumexp(0)
    return Space(log_target, log_target - log_z, log_z)


SOFT = space(vector(0.6, -1.2, 0.3, 1.5, -0.4))
HARD = space(vector(0.6, -INF, 0.3, 1.5, -INF))
SPACES = {"soft": SOFT, "hard": HARD}


# f(t) and f'(inf)
TEXTBOOK: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    **{name: (row.f, row.slope_at_infinity) for name, row in textbook.TEXTBOOK.items()},
    "alpha=-0.5": (lambda t: (t**-0.5 + 0.5 * t - 1.5) / 0.75, 1 / 1.5),
    "alpha=0.3": (lambda t: (t**0.3 - 0.3 * t - 0.7) / (0.3 * -0.7), 1 / 0.7),
    "alpha=1.6": (lambda t: (t**1.6 - 1.6 * t + 0.6) / (1.6 * 0.6), INF),
}


def divergence_of(name: str) -> Divergence:
    family, _, exponent = name.partition("=")
    return get_divergence(family, alpha=float(exponent) if exponent else None)


def exact_gradient(divergence: Callable[[Tensor], Tensor]) -> Tensor:
    """Of a function of `log pi` `(N,)`, with respect to the logits, at `THETA`."""
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(divergence(theta.log_softmax(0)), theta)[0]


def f_divergence(name: str, target: Space) -> Callable[[Tensor], Tensor]:
    f, slope_at_infinity = TEXTBOOK[name]
    inside = target.log_posterior.isfinite()

    def value(log_policy: Tensor) -> Tensor:
        policy, posterior = log_policy.exp()[inside], target.log_posterior.exp()[inside]
        total = (posterior * f(policy / posterior)).sum()
        if inside.all():
            return total
        return total + slope_at_infinity * log_policy.exp()[~inside].sum()  # lim p f(pi/p) for p -> 0

    return value


def forward_kl(target: Space) -> Callable[[Tensor], Tensor]:
    posterior = target.log_posterior.exp()
    return lambda log_policy: (torch.special.xlogy(posterior, posterior) - posterior * log_policy).sum()


def reverse_kl(target: Space) -> Callable[[Tensor], Tensor]:
    return lambda log_policy: (log_policy.exp() * (log_policy - target.log_posterior)).sum()


class Groups(NamedTuple):
    """Groups of outcomes, `(P, G)`, and the probability of each under the proposal, `(P,)`."""

    outcomes: Tensor
    probability: Tensor

    def expectation(self, values: Tensor) -> Tensor:
        """Of a quantity per group, `(P, ...)`."""
        return torch.einsum("p,p...->...", self.probability, values)


def all_groups(group_size: int, log_q: Tensor) -> Groups:
    """All `5^G` groups in order."""
    outcomes = torch.tensor(list(itertools.product(range(NUM_OUTCOMES), repeat=group_size)))
    return Groups(outcomes, log_q[outcomes].sum(dim=1).exp())


def all_multisets(group_size: int, log_q: Tensor) -> Groups:
    """All groups up to their order, with the multinomial probability: 4,845 of them for G = 16 instead of 5^16."""
    outcomes = torch.tensor(list(itertools.combinations_with_replacement(range(NUM_OUTCOMES), group_size)))
    counts = torch.stack([(outcomes == outcome).sum(dim=1) for outcome in range(NUM_OUTCOMES)], dim=1).double()
    orders = math.lgamma(group_size + 1) - torch.lgamma(counts + 1).sum(dim=1)
    return Groups(outcomes, (orders + counts @ log_q).exp())


def group_gradient(coefficient: Tensor, outcomes: Tensor, log_policy: Tensor = LOG_POLICY) -> Tensor:
    """`(1/G) sum_i c_i grad log pi(y_i)` of each group, `(P, N)`."""
    scores = torch.eye(NUM_OUTCOMES, dtype=torch.float64) - log_policy.exp()  # (N, N), a row per outcome
    return (coefficient.unsqueeze(2) * scores[outcomes]).mean(dim=1)


def everything_valid(outcomes: Tensor) -> Tensor:
    return torch.ones_like(outcomes, dtype=torch.bool)


def coefficient_of(
    estimator: Estimator,
    log_policy: Tensor,
    log_target: Tensor,
    log_proposal: Tensor,
    log_z: Tensor,
    baseline: Tensor | None = None,
) -> Tensor:
    """An estimator's factor of `grad log pi`, without a baseline unless one is given."""
    zeros = torch.zeros_like(log_policy)
    return estimator.coefficient(
        Sequences(log_policy, log_target, log_proposal, log_z, zeros if baseline is None else baseline)
    )


def expected_gradient(estimator: Estimator, target: Space, log_q: Tensor, group_size: int = 3) -> Tensor:
    """The mean over all groups from `q` of what an estimator gives, `(N,)`, with the exact Z."""
    groups = all_groups(group_size, log_q)
    y = groups.outcomes
    prior = LOG_PRIOR[y]
    group = Group(LOG_POLICY[y], log_q[y], prior, phi=target.log_target[y] - prior)
    terms = estimator.terms(group, fixed_log_z(target.log_z.expand(len(y)), group))
    coefficient = estimator.coefficient(terms.sequences(group.log_policy))
    return groups.expectation(group_gradient(coefficient, y))
