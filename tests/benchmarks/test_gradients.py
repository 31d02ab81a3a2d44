"""The gradient laboratory: its moments from draws with known ones, its estimators by hand, and one small run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_bayes import cli
from trl_bayes.benchmarks import gradient_successes
from trl_bayes.benchmarks.exact_training import ExactProblem
from trl_bayes.benchmarks.gradient_estimators import SEQUENCE_LEVEL, ScoredGroup, candidates, mixture, with_past
from trl_bayes.benchmarks.gradient_moments import gradient_moments
from trl_bayes.benchmarks.gradient_scenes import path
from trl_bayes.benchmarks.gradients import GradientsArguments, best_share, measure_at
from trl_bayes.benchmarks.tiny import EnumerableTask
from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import ImportanceWeights, ScoreFunction


def test_moments_of_draws_whose_moments_are_known() -> None:
    """Bias (3, 4, 0, ..., 0) and variance 2 in each of ten directions; the errors are those of other draws."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.zeros(10)
    bias[:2] = torch.tensor([3.0, 4.0])
    found = [
        gradient_moments(bias + math.sqrt(2) * torch.randn(400, 10, generator=generator), torch.zeros(10))
        for _ in range(60)
    ]
    for name, truth in (("squared_bias", 25.0), ("variance", 20.0)):
        values = torch.tensor([getattr(each, name) for each in found])
        errors = torch.tensor([getattr(each, f"{name}_error") for each in found])
        assert (values.mean() - truth).abs() < 4 * values.std() / math.sqrt(60)
        assert errors.mean() == pytest.approx(values.std().item(), rel=0.3)


def test_the_bias_of_an_unbiased_estimator_is_not_its_noise() -> None:
    draws = torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    moments = gradient_moments(draws, torch.zeros(50))
    assert abs(moments.squared_bias) < 4 * moments.squared_bias_error < 0.25 * moments.variance
    assert math.isnan(gradient_moments(draws, None).squared_bias)


def scored(seed: int, num_tokens: int = 3) -> ScoredGroup:
    """Four completions of a table of logits over five tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, num_tokens, 5, dtype=torch.float64, generator=generator).requires_grad_()
    prior = torch.randn(4, num_tokens, 5, dtype=torch.float64, generator=generator).log_softmax(2)
    policy, tokens = logits.log_softmax(2), torch.randint(5, (4, num_tokens, 1), generator=generator)
    kl = (policy.exp() * (policy - prior)).sum(dim=2)
    phi = torch.randn(4, dtype=torch.float64, generator=generator)
    return ScoredGroup(policy.gather(2, tokens).squeeze(2), prior.gather(2, tokens).squeeze(2), kl, phi, 0.3)


def of(surrogate: Any, group: ScoredGroup) -> torch.Tensor:
    (found,) = torch.autograd.grad(surrogate(group), group.log_policy, retain_graph=True)
    return found


def test_nothing_of_the_past_taken_out_is_the_sequence_level_estimator() -> None:
    group = scored(0)
    first = candidates()[0]
    assert first.name == SEQUENCE_LEVEL
    torch.testing.assert_close(of(with_past(0.0), group), of(first.surrogate, group))
    half = (of(with_past(0.0), group) + of(with_past(1.0), group)) / 2
    torch.testing.assert_close(of(with_past(0.5), group), half)
    torch.testing.assert_close(of(mixture(with_past(0.0), with_past(1.0), 0.5), group), half)


def test_with_one_token_the_reward_to_go_is_all_of_it() -> None:
    group = scored(1, num_tokens=1)
    torch.testing.assert_close(of(with_past(1.0), group), of(with_past(0.0), group))


def test_the_best_share_has_the_least_variance() -> None:
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(500, 3, generator=generator), torch.randn(500, 3, generator=generator) / 2
    share = best_share(first, second)
    assert share == pytest.approx(0.8, abs=0.04)  # 1 / (1 + 1/4) for independent draws

    def variance(of_second: float) -> float:
        return ((1 - of_second) * first + of_second * second).var(dim=0).sum().item()

    assert variance(share) <= min(variance(share - 0.01), variance(share + 0.01), variance(0.0), variance(1.0))
    assert best_share(first, first) == 0.0


def test_a_small_run(tmp_path: Path) -> None:
    flags = ["--draws", "4", "--group_size", "3", "--num_parallel", "1", "--output_dir", str(tmp_path)]
    cli.main(["bench", "gradients", "--problems", "random-8", *flags])
    rows = json.loads((tmp_path / "gradients.json").read_text())["gradients"]
    by_policy: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_policy.setdefault(row["policy"], {})[row["estimator"]] = row
    assert [*by_policy] == ["prior", *(f"weights moved by {each}" for each in ("0.05", "0.1", "0.2")), "at p"]
    # At the prior there is no past to take out, and at p every coefficient of the sequence-level estimators is 0
    assert by_policy["prior"]["KL-RL, reward-to-go"]["relative_variance"] == pytest.approx(1)
    assert by_policy["prior"]["KL-RL, reward-to-go"]["kl_prior"] == pytest.approx(0, abs=1e-6)
    assert by_policy["at p"][SEQUENCE_LEVEL]["variance"] < 1e-15 < by_policy["at p"]["KL-RL, reward-to-go"]["variance"]
    assert by_policy["at p"][SEQUENCE_LEVEL]["squared_bias"] is None


def test_what_is_unbiased_by_enumeration_is_found_to_be() -> None:
    """All of the reverse KL's, and those that know Z: the squared bias is within its error, far below the noise."""
    torch.set_num_threads(1)
    task = EnumerableTask("abc", 3, ("a", "b c"), lambda texts: [float(text.count("a")) for text in texts], seed=0)
    policies = []
    for scene in path(ExactProblem("small", task, beta=0.5), steps=(0, 3)):
        policies.append(scene.policy)
        for row in measure_at(scene, draws=24, group_size=4, seed=0) if scene.policy != "at p" else []:
            if row.estimator.startswith("KL-RL") or row.estimator.endswith("known Z"):
                moments = row.moments
                assert abs(moments.squared_bias) < 4 * moments.squared_bias_error < moments.variance / 2
    assert policies == ["prior", "3 steps", "at p"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`problems`: 'leters' is not one of letters"):
        GradientsArguments(problems=["leters"])
    with pytest.raises(ValueError, match="`draws` must be at least 4"):
        GradientsArguments(draws=2)


@pytest.mark.parametrize("rate", gradient_successes.RATES)
def test_errors_of_the_first_visit_are_at_most_1_2_times_those_with_the_true_z(rate: float) -> None:
    """Rewards of 0 and 1 at beta = 0.1, whole groups of 16: for the estimators that need a Z."""
    ours = gradient_successes.RULES["at least 3/4 of the group's Z (ours)"]
    for estimator in (
        ImportanceWeights(get_divergence("forward_kl")),
        ScoreFunction(get_divergence("jensen_shannon")),
    ):
        best = gradient_successes.squared_error(estimator, rate, gradient_successes.known)
        assert best.squared_bias < 1e-20
        assert gradient_successes.squared_error(estimator, rate, ours).of() < 1.2 * best.of()


@pytest.mark.parametrize(
    ("divergence", "rate", "ours", "plain"),
    [
        ("forward_kl", 0.001, 0.0347, 488),
        ("forward_kl", 0.01, 0.948, 21_200),
        ("forward_kl", 0.2, 1.62, 1.65),
        ("jensen_shannon", 0.001, 0.527, 1.73),
    ],
)
def test_errors_with_samples_of_the_prior(divergence: str, rate: float, ours: float, plain: float) -> None:
    """Over those with the true Z: 100 samples, of which often none or one is a success; and their mean alone."""
    kind = ImportanceWeights if divergence == "forward_kl" else ScoreFunction
    estimator = kind(get_divergence(divergence))
    best = gradient_successes.squared_error(estimator, rate, gradient_successes.known).of()
    for is_bounded, expected in ((True, ours), (False, plain)):
        found = gradient_successes.squared_error_by_samples(estimator, rate, is_bounded).of()
        assert found / best == pytest.approx(expected, rel=5e-3)


def test_the_squared_error_with_the_true_z_by_hand() -> None:
    """DPG's coefficient is 1 - w/Z of a success and of a failure, so that completions are independent."""
    rate, size = 0.1, 5
    z = rate * math.exp(gradient_successes.PHI) + 1 - rate
    values = [(1 - math.exp(gradient_successes.PHI) / z) * (1 - rate), (1 - 1 / z) * -rate]
    mean = rate * values[0] + (1 - rate) * values[1]
    variance = (rate * values[0] ** 2 + (1 - rate) * values[1] ** 2 - mean**2) / size
    estimator = ImportanceWeights(get_divergence("forward_kl"))
    found = gradient_successes.squared_error(estimator, rate, gradient_successes.known, size)
    assert found.of() == pytest.approx(variance)
    assert found.of(4) == pytest.approx(variance / 4)
