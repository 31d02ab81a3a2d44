"""Divergences from a group's own samples, against sums over all outcomes: unbiased, and with a small error near p."""

import math

import pytest
import torch
from torch import Tensor

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
    assert huge.forward_kl.nan_to_num().isfinite().all()
