"""Scored prior samples: the log Z that they give, its standard error, and the table by prompt key."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_bayes.targets import ChiSquared, Constraint, PriorScores, PromptTable, Tempered, Tilt, log_z_from_prior


INF, NAN = math.inf, math.nan


def test_log_z_is_within_three_standard_errors(enumerated: Any) -> None:
    """
    In 99 % of 5,000 seeds of 2,000 samples: of each of 4 prompts, and the mean over prompts.

    The tilt has an effective sample size of 0.1 for some prompts and weights of skewness 13: 0.74 % of its 20,000
    estimates are expected to lie outside, with a standard deviation of 0.06 %, so that a false alarm by other seeds is
    as rare as 4 standard deviations. For the other two targets it is 0.3 %.
    """
    a, b = ((enumerated.ids == "abcdef".index(letter)).sum(dim=1) for letter in "ab")
    rewards = torch.stack([a - b / 2, (a >= 1).float()], dim=1)
    targets = [Tilt(0.7, rewards="soft"), Constraint("hard"), Tempered(1.3)]
    for target in targets:
        target.bind(["soft", "hard"])
    phi = torch.stack(
        [torch.stack([target(rewards, enumerated.context(i)) for i in range(4)]) for target in targets]
    )  # (3, P, M)
    exact = (enumerated.log_prior + phi).logsumexp(dim=2, keepdim=True)  # (3, P, 1)
    ratios, ratios_of_mean = [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):  # of 100 seeds
        drawn = torch.multinomial(enumerated.log_prior.exp(), 100 * 2000, replacement=True, generator=generator)
        for k in range(3):
            estimate = log_z_from_prior(phi[k].gather(1, drawn).view(4 * 100, 2000))
            error, spread = (estimate.log_z.view(4, 100) - exact[k], estimate.standard_error.view(4, 100))
            ratios.append(error / spread)
            ratios_of_mean.append(error.sum(dim=0) / spread.square().sum(dim=0).sqrt())
    for k in range(3):
        of_prompts, of_means = torch.cat(ratios[k::3], dim=1), torch.cat(ratios_of_mean[k::3])
        assert (of_prompts.abs() > 3).double().mean() <= 0.01
        assert (of_means.abs() > 3).double().mean() <= 0.01
        assert of_prompts.std().item() == pytest.approx(1.0, abs=0.05)  # neither too small nor too large


def test_log_z_by_hand() -> None:
    phi = torch.tensor([[0.0, math.log(3.0), NAN, NAN], [-INF, 0.0, -INF, -INF], [2.0] * 4])
    estimate = log_z_from_prior(phi)
    assert estimate.log_z.exp().tolist() == pytest.approx([2.0, 0.25, math.exp(2.0)])
    # Weights 1 and 3: mean 2, standard deviation sqrt(2), of the mean 1, relative 1/2; symmetric, so no skewness.
    # 1, 0, 0, 0: standard deviation 1/2, of the mean 1/4, relative 1; deviations 3/4 and three times -1/4
    skewness = (0.75**3 - 3 * 0.25**3) / (0.75**2 + 3 * 0.25**2) ** 1.5
    expected = [0.5, math.sqrt(1 + skewness), 0.0]
    assert estimate.standard_error.tolist() == pytest.approx(expected, abs=1e-7)
    assert estimate.ess.tolist() == pytest.approx([16 / 20, 0.25, 1.0])


def test_standard_error_is_that_of_a_mean_or_more() -> None:
    """The usual one for symmetric weights and those skewed to the left, at most `sqrt(2)` times that for others."""
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 7, 100):
        weights = torch.rand(500, n, generator=generator, dtype=torch.float64)
        for skewed in (weights, weights.pow(20), (1 - weights).pow(0.1)):
            usual = skewed.std(dim=1) / skewed.mean(dim=1) / math.sqrt(n)
            ratio = log_z_from_prior(skewed.log()).standard_error / usual
            assert (ratio > 1 - 1e-6).all() and (ratio < math.sqrt(2)).all()
        both_sides = torch.cat([weights, 1 - weights], dim=1)
        usual = both_sides.std(dim=1) / both_sides.mean(dim=1) / math.sqrt(2 * n)
        torch.testing.assert_close(log_z_from_prior(both_sides.log()).standard_error, usual)


def test_log_z_where_there_is_nothing() -> None:
    phi = torch.tensor([[-INF, -INF], [NAN, NAN], [1.0, NAN]])
    estimate = log_z_from_prior(phi)
    assert estimate.log_z.tolist() == pytest.approx([-INF, NAN, 1.0], nan_ok=True)
    assert estimate.standard_error.tolist() == [INF, INF, INF]
    assert estimate.ess.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_log_z_does_not_overflow(size: float) -> None:
    estimate = log_z_from_prior(torch.tensor([[size, size + 1]]))
    assert estimate.log_z.item() == pytest.approx(size + math.log((1 + math.e) / 2), abs=1e-3)
    assert estimate.ess.item() == pytest.approx((1 + math.e) ** 2 / (1 + math.e**2) / 2)


def test_chi_squared_has_no_z_to_estimate(enumerated: Any) -> None:
    """On the samples that tau was fitted to, Z is 1 exactly."""
    prior = enumerated.sample(enumerated.feature("a").unsqueeze(1), 500, seed=0)
    target = ChiSquared(0.2)
    target.fit(prior)
    estimate = prior.estimate_log_z(target)
    assert estimate.log_z.tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    assert (estimate.ess < 1).all()


def test_infinite_rewards_are_missing() -> None:
    prior = PriorScores(torch.tensor([[[INF], [1.0], [-INF]]]), torch.zeros(1, 3), torch.tensor([0]))
    assert prior.rewards.flatten().tolist() == pytest.approx([NAN, 1.0, NAN], nan_ok=True)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (2, 3), (2,)), r"takes rewards \(P, N, K\), log_prior \(P, N\) and keys \(P,\), got \(2, 3\), "),
        (((2, 3, 1), (2, 2), (2,)), "takes rewards"),
        (((2, 3, 1), (2, 3), (3,)), "takes rewards"),
        (((2, 1, 1), (2, 1), (2,)), "takes at least 1 prompt and 2 samples of each, got 2 and 1: draw more"),
        (((0, 5, 1), (0, 5), (0,)), "takes at least 1 prompt and 2 samples of each, got 0 and 5"),
    ],
)
def test_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    rewards, log_prior, keys = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        PriorScores(rewards, log_prior, keys.long())


def test_a_prompt_twice() -> None:
    with pytest.raises(ValueError, match=r"must have different keys: give each prompt once\.$"):
        PriorScores(torch.zeros(2, 3, 1), torch.zeros(2, 3), torch.tensor([4, 4]))


def test_table_finds_prompts_in_any_order(tmp_path: Path) -> None:
    keys = torch.tensor([2**59 + 1, -3, 2**59, 8])
    table = PromptTable.of(keys, torch.arange(8.0).view(4, 2))
    torch.save(table.state_dict(), tmp_path / "table.pt")
    restored = PromptTable(**torch.load(tmp_path / "table.pt", weights_only=True))
    for each in (table, restored):
        assert each.lookup(torch.tensor([8, 2**59, 8, 2**59 + 1])).tolist() == [[6, 7], [4, 5], [6, 7], [0, 1]]
        assert each.lookup(torch.tensor([], dtype=torch.int64)).shape == (0, 2)
        for unknown in (-4, 0, 2**59 + 2):
            with pytest.raises(ValueError, match="^1 of 2 prompts have no prior samples: draw them for every prompt"):
                each.lookup(torch.tensor([8, unknown, unknown]))


def test_multiplicity() -> None:
    """Once each if nothing is said; on the CPU, whatever numbers they are."""
    rewards, log_prior, keys = torch.zeros(3, 2, 1), torch.zeros(3, 2), torch.arange(3)
    assert PriorScores(rewards, log_prior, keys).multiplicity.tolist() == [1.0, 1.0, 1.0]
    given = PriorScores(rewards, log_prior, keys, multiplicity=torch.tensor([2, 0, 1]))
    assert given.multiplicity.tolist() == [2.0, 0.0, 1.0]
    assert given.under(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)).multiplicity.tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("multiplicity", [[1, 1], [1.0, -1.0, 1.0], [0, 0, 0], [1.0, NAN, 1.0], [1.0, INF, 1.0]])
def test_multiplicity_refused(multiplicity: list[float]) -> None:
    with pytest.raises(
        ValueError, match="`multiplicity` says how often each prompt occurs in the training data: give"
    ):
        PriorScores(torch.zeros(3, 2, 1), torch.zeros(3, 2), torch.arange(3), multiplicity=torch.tensor(multiplicity))
