"""Divergences from a group's own samples, against sums over all outcomes: unbiased, and with a small error near p."""

import math

import pytest
import torch
from torch import Tensor

from tests.helpers.outcomes import LOG_POLICY, LOG_PRIOR, OTHER_PROPOSAL, SOFT, all_multisets, forward_kl, reverse_kl
from trl_bayes.groups import pooled_log_z
from trl_bayes.statistics.second_order import second_order_divergences


NUM_GROUPS, SIZE, NUM_OUTCOMES = 4000, 16, 8


def tables(spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """`log pi`, `log p` and `log q`, (outcomes,); pi is as far from p as the spread of the noise says."""
    generator = torch.Generator().manual_seed(0)
    log_p, noise, other = (torch.randn(NUM_OUTCOMES, generator=generator, dtype=torch.float64) for _ in range(3))
    log_pi = log_p + spread * noise
    return log_pi.log_softmax(0), log_p.log_softmax(0), (log_pi + other / 3).log_softmax(0)


def groups(log_q: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(log_q.exp(), NUM_GROUPS * SIZE, replacement=True, generator=generator)
    return drawn.view(NUM_GROUPS, SIZE)


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize(("spread", "times"), [(0.05, 10.0), (0.3, 2.5), (2.0, 1.0)])
def test_unbiased_and_never_worse_than_the_plain_mean(spread: float, times: float, on_policy: bool) -> None:
    log_pi, log_p, log_q = tables(spread)
    log_q = log_pi if on_policy else log_q
    drawn = groups(log_q)
    valid = torch.ones_like(drawn, dtype=torch.bool)
    found = second_order_divergences(log_pi[drawn], log_p[drawn], log_q[drawn], valid)
    rho, w = (log_pi - log_q).exp()[drawn], (log_p - log_q).exp()[drawn]
    plain = {"reverse_kl": rho * (log_pi - log_p)[drawn], "forward_kl": w * (log_p - log_pi)[drawn]}
    exact = {
        "reverse_kl": (log_pi.exp() * (log_pi - log_p)).sum().item(),
        "forward_kl": (log_p.exp() * (log_p - log_pi)).sum().item(),
    }
    for name, values in found._asdict().items():
        error = values.std().item() / math.sqrt(NUM_GROUPS)
        assert abs(values.mean().item() - exact[name]) < 4 * error, name
        # Off-policy the ratio's noise is left, which no c removes
        factor = times if on_policy else 1.0
        assert values.std() <= 1.001 * plain[name].mean(dim=1).std() / factor, name


def test_the_posterior_itself_has_no_error() -> None:
    log_p = tables(0.0)[1]
    drawn = groups(log_p)[:50]
    found = second_order_divergences(log_p[drawn], log_p[drawn], log_p[drawn], torch.ones_like(drawn).bool())
    assert found.reverse_kl.abs().max() == found.forward_kl.abs().max() == 0


def test_what_is_not_known() -> None:
    """No valid sample, a single one, and a sample outside the support."""
    log_pi = torch.tensor([[-1.0, -2.0, -3.0]] * 4).double()
    log_p = torch.tensor(
        [[-1.5, -1.0, -2.0], [-1.5, -1.0, -2.0], [-1.5, -math.inf, -2.0], [-1.5, -1.0, -2.0]]
    ).double()
    valid = torch.tensor([[True, True, True], [False, False, False], [True, True, True], [True, False, False]])
    found = second_order_divergences(log_pi, log_p, log_pi, valid)
    assert found.reverse_kl.isnan().tolist() == [False, True, True, False]
    assert found.forward_kl.isnan().tolist() == [False, True, False, False]
    huge = second_order_divergences(log_pi, log_pi + 1e4, log_pi, valid)
    assert huge.forward_kl.isnan().tolist() == [False, True, False, False]
    assert not huge.forward_kl.isinf().any()


@pytest.mark.parametrize(
    ("share", "on_policy", "times"),
    [
        (0.1, True, 15.0),  # KL .004
        (0.5, True, 3.5),  # .09
        (1.0, True, 1.4),  # the prior, .37
        (2.0, True, 1.0),  # 1.1 and 1.4
        (0.1, False, 6.0),
        (0.5, False, 3.4),
        (1.0, False, 2.4),
        (2.0, False, 1.7),
    ],
)
def test_a_single_group_of_eight(share: float, on_policy: bool, times: float) -> None:
    """
    By enumeration, with the true Z: nearly unbiased, closer than the plain mean near the posterior and no further off
    far from it, although c is fitted to eight samples.
    """
    log_policy = ((1 - share) * SOFT.log_posterior + share * LOG_PRIOR).log_softmax(0)
    log_q = log_policy if on_policy else OTHER_PROPOSAL
    groups = all_multisets(8, log_q)
    y, valid = groups.outcomes, torch.ones(1, 8, dtype=torch.bool)
    laws = (log_policy, SOFT.log_posterior, log_q)
    found = [second_order_divergences(*(table[row] for table in laws), valid) for row in y.unsqueeze(1)]
    surprise = log_policy - SOFT.log_posterior
    plain = {
        "reverse_kl": (log_policy - log_q).exp() * surprise,
        "forward_kl": -(SOFT.log_posterior - log_q).exp() * surprise,
    }
    exact = {"reverse_kl": reverse_kl(SOFT)(log_policy), "forward_kl": forward_kl(SOFT)(log_policy)}
    for name, without in plain.items():
        values = torch.cat([getattr(each, name) for each in found])
        bias = (groups.expectation(values) - exact[name]).abs()
        assert bias < 0.0005 + 0.06 * exact[name]
        spread = [
            groups.expectation((each - groups.expectation(each)).square()).sqrt()
            for each in (values, without[y].mean(dim=1))
        ]
        assert times * spread[0] < spread[1], name


def test_distance_from_the_prior_is_the_same_estimate() -> None:
    """KL(pi||pi_0), with the prior as the posterior: no error where the policy still is the prior."""
    y = torch.tensor([[0, 1, 2, 3]])
    found = second_order_divergences(LOG_PRIOR[y], LOG_PRIOR[y], LOG_PRIOR[y], torch.ones_like(y).bool())
    assert found.reverse_kl.item() == 0


def test_a_posterior_that_is_not_seen_takes_nothing_away() -> None:
    """Far from p every w is as good as 0, and its mean is 1 by one completion in e^30: the control variate is left."""
    log_pi = torch.linspace(-40.0, -20.0, 16).unsqueeze(0).double()
    log_p = log_pi - torch.linspace(29.0, 31.0, 16).double()
    found = second_order_divergences(log_pi, log_p, log_pi, torch.ones_like(log_pi).bool())
    assert found.reverse_kl.item() == pytest.approx(30.0)


def test_z_from_the_group_itself_is_nearly_the_plain_mean() -> None:
    """All weights of the group have the mean 1 then, and the errors of the mean and of log Z cancel already."""
    groups = all_multisets(6, LOG_POLICY)
    y = groups.outcomes
    log_w = SOFT.log_target[y] - LOG_POLICY[y]
    log_z = pooled_log_z(log_w, torch.ones_like(y).bool()).unsqueeze(1)
    plain = groups.expectation((log_z - log_w).mean(dim=1))
    values = torch.cat(
        [
            second_order_divergences(LOG_POLICY[row], SOFT.log_target[row] - z, LOG_POLICY[row], (row >= 0)).reverse_kl
            for row, z in zip(y.unsqueeze(1), log_z, strict=True)
        ]
    )
    exact = reverse_kl(SOFT)(LOG_POLICY)
    assert abs(groups.expectation(values) - exact) < abs(plain - exact) < 0.25 * exact
