"""Win rates against the prior: exact ones against sampling, sampled ones against exact ones, and by hand."""

import math

import pytest
import torch

from trl_bayes.benchmarks.win_rates import WinRates, sampled_win_rates, win_rates


def test_win_rates_against_sampling() -> None:
    """With ties, and 400,000 pairs: a standard error of 0.0008, and 5 of them."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0])
    policy, prior = (torch.randn(5, generator=generator).log_softmax(0) for _ in range(2))
    exact = win_rates(policy, prior, rewards, n=3)
    ours, theirs = (
        rewards[p.exp().multinomial(1_200_000, replacement=True, generator=generator)].view(-1, 3)
        for p in (policy, prior)
    )
    for column, (a, b) in {
        "plain": (ours[:, 0], theirs[:, 0]),
        "best_of_n": (ours.amax(1), theirs.amax(1)),
        "worst_of_n": (ours.amin(1), theirs.amin(1)),
    }.items():
        sampled = ((a > b).double() + (a == b).double() / 2).mean().item()
        assert getattr(exact, column) == pytest.approx(sampled, abs=0.004)
    assert exact.kl_prior == pytest.approx((policy.exp() * (policy - prior)).sum().item())


def test_win_rates_of_samples() -> None:
    """40,000 samples for each of two prompts, with ties: a standard error of 0.002, and 4 of them; not of one size."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor([[3.0, 1.0, 2.0, 2.0, 5.0], [0.0, 7.0, 7.0, -1.0, 2.0]])
    policy, prior = torch.randn(2, 2, 5, generator=generator).log_softmax(2)
    exact = [win_rates(*each) for each in zip(policy, prior, rewards, strict=True)]
    ours, theirs = (
        rewards.gather(1, p.exp().multinomial(count, replacement=True, generator=generator))
        for p, count in ((policy, 40_000), (prior, 50_000))
    )
    found = sampled_win_rates(ours, theirs)
    assert math.isnan(found.kl_prior)
    for column in ("plain", "best_of_n", "worst_of_n"):
        expected = sum(getattr(rates, column) for rates in exact) / 2
        assert getattr(found, column) == pytest.approx(expected, abs=0.008)


def test_the_prior_wins_half_of_the_time() -> None:
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    assert win_rates(prior, prior, torch.tensor([1.0, 1.0, 0.0, 7.0])) == pytest.approx(WinRates(0.0, 0.5, 0.5, 0.5))


def test_certain_win_and_certain_loss() -> None:
    prior = torch.tensor([1.0, 0.0, 0.0]).log()
    best, worst = torch.tensor([0.0, 1.0, 0.0]).log(), torch.tensor([0.0, 0.0, 1.0]).log()
    rewards = torch.tensor([0.0, 1.0, -1.0])
    assert win_rates(best, prior, rewards)[1:] == (1.0, 1.0, 1.0)
    assert win_rates(worst, prior, rewards)[1:] == (0.0, 0.0, 0.0)
