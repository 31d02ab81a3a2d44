"""Chi-squared-regularized RL: phi = log [1 + (r - tau)/(2 beta)]_+."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_bayes.targets import ChiSquared, Context, PriorScores
from trl_bayes.targets.chi_squared import normalizing_threshold


INF, NAN = math.inf, math.nan


def mean_ratio(rewards: Tensor, tau: Tensor, beta: float) -> Tensor:
    """`mean_i [1 + (r_i - tau)/(2 beta)]_+` of each row."""
    return (1 + (rewards.double() - tau.unsqueeze(1)) / (2 * beta)).clamp(min=0).nanmean(dim=1)


@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("offset", [0.0, 1e6, -1e6])
def test_tau_normalizes_exactly(beta: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(7, 200, generator=generator).double() + offset
    rewards[1] = 3.0  # all the same
    rewards[2] = (rewards[2] > offset).double()  # a few values
    rewards[3, :150] = NAN
    tau = normalizing_threshold(rewards, beta)
    # tau itself is rounded: 1e6 to 1e-10, in units of 2 beta
    assert mean_ratio(rewards, tau, beta).tolist() == pytest.approx([1.0] * 7, abs=1e-9 + 1e-9 * abs(offset) / beta)


def test_tau_is_the_mean_where_all_have_a_probability() -> None:
    rewards = torch.tensor([[0.0, 1.0, 5.0]])
    assert normalizing_threshold(rewards, 10.0).tolist() == pytest.approx([2.0])
    # and only the best counts where the regularization is weak: 1 + (5 - tau)/(2 beta) = 3
    assert normalizing_threshold(rewards, 0.5).tolist() == pytest.approx([3.0])


def test_no_reward_no_threshold() -> None:
    assert normalizing_threshold(torch.full((1, 4), NAN), 1.0).isnan().all()


def test_it_is_the_optimum(enumerated: Any) -> None:
    """No other distribution has a higher `E[r] - beta chi2(pi||pi_0)`; with all completions as equal prior samples."""
    generator = torch.Generator().manual_seed(0)
    rewards, beta = torch.randn(500, generator=generator), 0.4
    target = ChiSquared(beta)
    target.fit(PriorScores(rewards.view(1, -1, 1), torch.zeros(1, 500), torch.tensor([3])))
    context = Context(torch.zeros(500), torch.full((500,), 3))
    posterior = target(rewards.unsqueeze(1), context).double().exp() / 500
    assert posterior.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert 0.05 < (posterior == 0).double().mean().item() < 0.95

    def objective(policy: Tensor) -> Tensor:
        return policy @ rewards.double() - beta * ((500 * policy - 1) ** 2).mean()

    best = objective(posterior)
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            other = torch.rand(500, generator=generator).double()
            mixed = (1 - scale) * posterior + scale * other / other.sum()
            assert objective(mixed) < best


def test_exact_posterior_from_2000_samples(enumerated: Any) -> None:
    """What the support is, and Z, on the enumerated prior."""
    rewards = (2 * enumerated.feature("a") - enumerated.feature("b")).unsqueeze(1)
    target = ChiSquared(beta=0.3)
    target.fit(enumerated.sample(rewards, 2000, seed=0))
    for i, log_prior in enumerate(enumerated.log_prior):
        phi = target(rewards, enumerated.context(i))
        exact = normalized(log_prior, rewards[:, 0].double(), 0.3)
        posterior = (log_prior + phi).softmax(dim=0)
        assert (posterior - exact).abs().sum().item() / 2 < 0.03
        assert (log_prior + phi).logsumexp(dim=0).item() == pytest.approx(0.0, abs=0.1)
    log_z = target.log_z(enumerated.keys.flip(0))
    assert log_z.tolist() == [0.0] * 4


def normalized(log_prior: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """The optimum under the true prior, with tau by bisection."""
    low, high = rewards.min() - 1, rewards.max() + 2 * beta
    for _ in range(100):
        tau = (low + high) / 2
        total = (log_prior.exp() * (1 + (rewards - tau) / (2 * beta)).clamp(min=0)).sum()
        low, high = (tau, high) if total > 1 else (low, tau)
    return log_prior.exp() * (1 + (rewards - tau) / (2 * beta)).clamp(min=0)


def test_missing_rewards() -> None:
    target = ChiSquared(1.0)
    prior = torch.tensor([[[1.0], [NAN], [3.0]], [[NAN], [NAN], [INF]]])
    target.fit(PriorScores(prior, torch.zeros(2, 3), torch.tensor([0, 1])))
    phi = target(torch.tensor([[2.0], [NAN], [2.0], [-9.0]]), Context(torch.zeros(4), torch.tensor([0, 0, 1, 0])))
    assert phi.tolist() == pytest.approx([0.0, NAN, NAN, -INF], nan_ok=True)
    assert target.log_z(torch.tensor([0, 1])).tolist() == pytest.approx([0.0, NAN], nan_ok=True)


def test_settings() -> None:
    assert ChiSquared(1.0).hard
    assert repr(ChiSquared(1, rewards="r")) == "ChiSquared(beta=1.0, rewards=['r'])"
    for beta in (0.0, -1.0, INF, NAN):
        with pytest.raises(ValueError, match="`ChiSquared` needs a positive finite `beta`"):
            ChiSquared(beta)
