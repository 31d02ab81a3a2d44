"""The conjunction of rewards: phi = sum_k log sigmoid(r_k - ref_k) / gamma."""

import math

import pytest
import torch

from trl_bayes.targets import Context, LogSigmoidCentered, PriorScores


INF, NAN = math.inf, math.nan
NAMES = ["helpful", "unused", "harmless"]


def fitted(prior: torch.Tensor, **settings: float) -> LogSigmoidCentered:
    target = LogSigmoidCentered(["helpful", "harmless"], **settings)
    target.bind(NAMES)
    target.fit(PriorScores(prior, torch.zeros(prior.shape[:2]), torch.tensor([8, 2])))
    return target


def test_phi_against_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    prior = torch.randn(2, 400, 3, generator=generator) * torch.tensor([1.0, 1.0, 7.0])
    rewards = torch.randn(5, 3, generator=generator)
    phi = fitted(prior, gamma=0.5)(rewards, Context(torch.zeros(5), torch.tensor([8, 2, 2, 8, 8])))
    for i, prompt in enumerate([0, 1, 1, 0, 0]):
        # the 85th percentile of 400 samples: at place 0.85 * 399 in ascending order
        low, high = (prior[prompt].sort(dim=0).values[place] for place in (339, 340))
        reference = low + (0.85 * 399 - 339) * (high - low)
        expected = sum(-math.log1p(math.exp(-(rewards[i, k] - reference[k]).item())) for k in (0, 2))
        assert phi[i].item() == pytest.approx(expected / 0.5, rel=1e-4)


def test_it_is_a_conjunction() -> None:
    """Excellent in one and poor in the other is worth less than good in both, though its sum is higher."""
    target = fitted(torch.linspace(-1, 1, 101).view(1, -1, 1).repeat(2, 1, 3))
    phi = target(torch.tensor([[9.0, 0.0, -2.0], [2.0, 0.0, 2.0]]), Context(torch.zeros(2), torch.tensor([8, 8])))
    assert phi[0] < phi[1] < 0


def test_missing_rewards_and_references() -> None:
    prior = torch.zeros(2, 4, 3)
    prior[1, :, 0] = NAN
    target = fitted(prior)
    rewards = torch.tensor([[NAN, 0.0, 0.0], [NAN, 0.0, NAN], [5.0, 0.0, 0.0], [5.0, 0.0, NAN]])
    phi = target(rewards, Context(torch.zeros(4), torch.tensor([8, 8, 2, 2])))
    assert phi.tolist() == pytest.approx([-math.log(2), NAN, -math.log(2), NAN], nan_ok=True)
    with pytest.raises(
        ValueError, match="No sample of the prior has a 'helpful' or 'harmless': LogSigmoidCentered has"
    ):
        fitted(torch.full((2, 4, 3), NAN))


def test_large_rewards_do_not_overflow() -> None:
    target = fitted(torch.zeros(2, 4, 3))
    phi = target(torch.tensor([[1e30] * 3, [-1e30] * 3]), Context(torch.zeros(2), torch.tensor([8, 8])))
    assert phi.tolist() == pytest.approx([0.0, -2e30])


def test_settings() -> None:
    assert not LogSigmoidCentered().hard
    assert repr(LogSigmoidCentered()) == "LogSigmoidCentered(gamma=1.0, quantile=0.85)"
    for quantile in (0.0, 1.0, -0.1, 85, NAN):
        with pytest.raises(ValueError, match="`LogSigmoidCentered` needs a `quantile` between 0 and 1, both excluded"):
            LogSigmoidCentered(quantile=quantile)
    for gamma in (0.0, -1.0, INF, NAN):
        with pytest.raises(ValueError, match="`LogSigmoidCentered` needs a positive finite `gamma`"):
            LogSigmoidCentered(gamma=gamma)
