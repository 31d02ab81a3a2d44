"""A share of each group from the prior, all weighted by the mixture's density: summed over all groups of a space."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.helpers.outcomes import (
    HARD,
    LOG_POLICY,
    LOG_PRIOR,
    NUM_OUTCOMES,
    SOFT,
    THETA,
    Space,
    exact_gradient,
    f_divergence,
    group_gradient,
)
from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import Estimator, ImportanceWeights, PolicyGradient, ScoreFunction, TrajectoryBalance
from trl_bayes.groups import Group, effective_sample_size
from trl_bayes.partitions import LeaveOneOut, fixed_log_z


def log_mixture(log_policy: Tensor, number: int, size: int) -> Tensor:
    """`log((1-a) pi + a pi_0)` with a = number / size."""
    share = number / size
    return ((1 - share) * log_policy.exp() + share * LOG_PRIOR.exp()).log()


class Groups:
    """All groups of `size` outcomes, the first `number` of them the prior's, with their probabilities."""

    def __init__(self, target: Space, log_policy: Tensor, number: int, size: int):
        self.outcomes = y = torch.tensor(list(itertools.product(range(NUM_OUTCOMES), repeat=size)))
        self.log_policy = log_policy
        self.probability = (LOG_PRIOR[y[:, :number]].sum(dim=1) + log_policy[y[:, number:]].sum(dim=1)).exp()
        log_q, phi = log_mixture(log_policy, number, size), target.log_target - LOG_PRIOR
        from_prior = torch.zeros_like(y, dtype=torch.bool)
        from_prior[:, :number] = True
        self.group = Group(log_policy[y], log_q[y], LOG_PRIOR[y], phi[y], from_prior=from_prior)
        self.known = fixed_log_z(target.log_z.expand(len(y)), self.group)

    def gradient(self, estimator: Estimator, estimates_z: bool = False) -> Tensor:
        """The mean of an estimator's, with the true Z or with that of the siblings."""
        log_z = LeaveOneOut().log_z(self.group) if estimates_z else self.known
        terms = estimator.terms(self.group, log_z)
        coefficient = estimator.coefficient(terms.sequences(self.group.log_policy)).masked_fill(~terms.usable, 0.0)
        gradients = group_gradient(coefficient, self.outcomes, self.log_policy)
        return torch.einsum("p,pn->n", self.probability, gradients)


def estimator_of(name: str) -> Estimator:
    kind = {"forward_kl": ImportanceWeights, "reverse_kl": PolicyGradient}.get(name, ScoreFunction)
    return kind(get_divergence(name))


@pytest.mark.parametrize(
    ("target", "name"),
    [(SOFT, "forward_kl"), (SOFT, "reverse_kl"), (SOFT, "jensen_shannon"), (HARD, "forward_kl")],
    ids=["soft-forward_kl", "soft-reverse_kl", "soft-jensen_shannon", "hard-forward_kl"],
)
def test_the_gradient_is_exact_with_the_true_z(target: Space, name: str) -> None:
    gradient = Groups(target, LOG_POLICY, number=1, size=4).gradient(estimator_of(name))
    torch.testing.assert_close(gradient, exact_gradient(f_divergence(name, target)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_with_the_siblings_z_the_bias_is_of_the_order_of_one_over_the_group(name: str) -> None:
    """A third from the prior, of groups of 3 and of 6: about half the bias, as without a prior's share."""
    exact = exact_gradient(f_divergence(name, SOFT))
    bias = [
        (Groups(SOFT, LOG_POLICY, number, size).gradient(estimator_of(name), estimates_z=True) - exact).norm().item()
        for number, size in ((1, 3), (2, 6))
    ]
    if name == "reverse_kl":  # which needs no Z
        assert max(bias) < 1e-10
    else:
        assert 0.01 < bias[0] / exact.norm() < 0.2
        assert bias[1] < 0.65 * bias[0]


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_nothing_moves_at_the_posterior(name: str) -> None:
    """
    With the true Z there is no noise. With that of the siblings, whose weights differ under a mixture, DPG has some,
    and a mean that is halved by groups of twice the size.
    """
    at_posterior = Groups(SOFT, SOFT.log_posterior, number=1, size=3)
    terms = estimator_of(name).terms(at_posterior.group, at_posterior.known)
    assert terms.advantages.abs().max() < 1e-10
    left = [
        Groups(SOFT, SOFT.log_posterior, number, size).gradient(estimator_of(name), estimates_z=True).norm().item()
        for number, size in ((1, 3), (2, 6))
    ]
    if name == "forward_kl":
        exact = exact_gradient(f_divergence(name, SOFT)).norm()
        assert 0.001 < left[0] / exact < 0.1
        assert left[1] < 0.55 * left[0]
    else:
        assert max(left) < 1e-10


def test_log_variance_keeps_the_posterior_under_a_mixture() -> None:
    """Trajectory balance with the fitted constant has no gradient there; away from it, that of the log-ratio's
    variance under the mixture."""
    estimator = TrajectoryBalance(get_divergence("reverse_kl"), fits_log_z=True)
    at_posterior = Groups(SOFT, SOFT.log_posterior, number=1, size=4)
    assert estimator.terms(at_posterior.group, at_posterior.known).advantages.abs().max() < 1e-10
    theta = THETA.clone().requires_grad_()
    log_policy = theta.log_softmax(0)
    q = log_mixture(LOG_POLICY, 1, 2).exp()
    difference = log_policy - SOFT.log_target
    variance = (q * difference.square()).sum() - (q * difference).sum().square()
    exact = torch.autograd.grad(variance / 2, theta)[0]
    gradient = Groups(SOFT, LOG_POLICY, number=2, size=4).gradient(estimator)
    off = (gradient - exact).norm() / exact.norm()
    assert off < 0.4 and torch.cosine_similarity(gradient, exact, dim=0) > 0.95


def test_effective_sample_size_is_the_policy_s() -> None:
    """Not the mixture's: 1 at the posterior, and elsewhere what the policy's own samples would have."""
    y = torch.arange(NUM_OUTCOMES)
    counts = 2000 * log_mixture(LOG_POLICY, 1, 4).exp()
    drawn = y.repeat_interleave(counts.round().long())
    for log_policy in (LOG_POLICY, SOFT.log_posterior):
        log_q = log_mixture(LOG_POLICY, 1, 4)[drawn]
        weights = (SOFT.log_target[drawn] - log_q).unsqueeze(0)
        valid = torch.ones_like(weights, dtype=torch.bool)
        found = effective_sample_size(weights, valid, log_ratio=(log_policy[drawn] - log_q).unsqueeze(0))
        ratio = (SOFT.log_posterior - log_policy).exp()
        expected = 1 / (log_policy.exp() * ratio.square()).sum()
        assert found.item() == pytest.approx(expected.item(), abs=2e-3)
