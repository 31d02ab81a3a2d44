"""Log Z for a lone success, what a group can tell of Z, and an effective size that counts what was missed."""

import math

import pytest
import torch
from torch import Tensor

from trl_bayes.groups import (
    Group,
    bounded_leave_one_out_log_z,
    effective_sample_size,
    leave_one_out_log_z,
    pooled_log_z,
)


INF = math.inf
PHI = 10.0  # a 0/1 reward at beta = 0.1
G = 16


def groups_of_successes() -> tuple[Tensor, Tensor]:
    """Log weights of groups with 0, 1, ..., G successes, `(G + 1, G)`, and the mask of valid ones."""
    number = torch.arange(G + 1).unsqueeze(1)
    weights = torch.where(torch.arange(G) < number, PHI, 0.0).double()
    return weights, torch.ones_like(weights, dtype=torch.bool)


def kappa(rate: float, log_z: Tensor) -> float:
    """`E[Z / Z_i]` over successes, at the prior, by enumeration of the number of successes in a group."""
    weights, _ = groups_of_successes()
    probability = torch.tensor([math.comb(G, k) * rate**k * (1 - rate) ** (G - k) for k in range(G + 1)])
    true = math.log(rate * math.exp(PHI) + 1 - rate)
    over_successes = ((weights == PHI) * (true - log_z).exp()).sum(dim=1)
    return ((probability * over_successes).sum() / (G * rate)).item()


@pytest.mark.parametrize(
    ("rate", "plain", "bounded"),
    [(0.01, 190.31, 0.199), (0.05, 511.01, 0.746), (0.1, 454.49, 1.079), (0.2, 156.25, 1.242)],
)
def test_the_ratio_of_a_success_does_not_explode(rate: float, plain: float, bounded: float) -> None:
    """What a success counts, relative to what it should: in the hundreds with the plain leave-one-out estimate."""
    weights, valid = groups_of_successes()
    assert kappa(rate, leave_one_out_log_z(weights, valid)) == pytest.approx(plain, abs=0.01)
    assert kappa(rate, bounded_leave_one_out_log_z(weights, valid)) == pytest.approx(bounded, abs=0.001)


def test_the_bound_acts_only_where_one_sample_holds_much_of_the_weight() -> None:
    shares = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]]).log()
    valid = torch.ones(3, 4, dtype=torch.bool)
    plain, bounded = leave_one_out_log_z(shares, valid), bounded_leave_one_out_log_z(shares, valid)
    assert torch.equal(bounded[0], plain[0])
    assert torch.equal(bounded[1, 1:], plain[1, 1:])
    assert plain[1:, 0].tolist() == pytest.approx([math.log(0.3 / 3), -INF])
    assert bounded[1:, 0].tolist() == pytest.approx([math.log(0.25 * 3 / 4)] * 2)
    assert bounded[2, 1:].tolist() == pytest.approx([math.log(1 / 3)] * 3)  # siblings of the lone success


def test_the_fixed_point_stays() -> None:
    """At the posterior all weights are Z, and so is each estimate."""
    weights, valid = torch.full((1, 5), 1.7), torch.ones(1, 5, dtype=torch.bool)
    assert bounded_leave_one_out_log_z(weights, valid).tolist() == [pytest.approx([1.7] * 5)]


def test_the_bound_counts_the_past() -> None:
    """The first success of a prompt after many visits without one: within 4/3 times the number of all samples."""
    weights, valid = torch.tensor([[PHI, 0.0, 0.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    past = torch.tensor([math.log(96.0)]), torch.tensor([96.0])
    log_z = bounded_leave_one_out_log_z(weights, valid, *past)
    assert pooled_log_z(weights, valid, *past).item() == pytest.approx(math.log((99 + math.exp(PHI)) / 100))
    assert log_z[0, 0].item() == pytest.approx(math.log((99 + math.exp(PHI)) / 100 * 3 / 4))
    assert log_z[0, 1:].tolist() == pytest.approx([math.log((98 + math.exp(PHI)) / 99)] * 3)


@pytest.mark.parametrize(
    ("phi", "tells"),
    [
        ([0.0, 0.0, 0.0], False),
        ([1.0, 1.0, INF], False),  # INF stands for a completion without any reward
        ([1.0, INF, INF], False),
        ([INF, INF, INF], False),
        ([-INF, -INF, -INF], False),
        ([0.0, 0.0, 0.5], True),
        ([0.0, -INF, 0.0], True),
    ],
)
def test_a_group_tells_z_if_its_log_potentials_differ(phi: list[float], tells: bool) -> None:
    values = torch.tensor([phi])
    values = values.masked_fill(values == INF, torch.nan)
    zeros = torch.zeros_like(values)
    assert Group(zeros, zeros, zeros, values).tells_z.tolist() == [tells]


def test_effective_sample_size_counts_what_was_missed() -> None:
    """A group without a success, where Z is known: true 1 / E[(w/Z)^2] = .010, .86 by the group's own weights."""
    rate = 0.01
    log_z = torch.tensor([math.log(rate * math.exp(PHI) + 1 - rate)])
    weights, valid = torch.zeros(1, G), torch.ones(1, G, dtype=torch.bool)
    assert effective_sample_size(weights, valid).item() == pytest.approx(1.0)
    assert effective_sample_size(weights, valid, log_z).item() < 0.07
    # With all successes, or with just as many as Z says, nothing is missing
    for enough in (torch.full((1, G), PHI), log_z.unsqueeze(1).expand(1, G)):
        assert effective_sample_size(enough, valid, log_z).item() == pytest.approx(1.0, abs=1e-4)
