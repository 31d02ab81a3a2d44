"""Sequential Monte Carlo: Z without bias, bounds that bracket it, and an error that falls with the particles.

Comparisons with a standard error allow 4 of them, which a correct sampler exceeds once in 16,000; chi-square tests
accept p-values above 1e-4. All seeds are fixed.
"""

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from trl_bayes.samplers import Rejection, SequentialMonteCarlo
from trl_bayes.samplers.smc import conditional_systematic, systematic
from trl_bayes.targets import Constraint, Product, Tilt


def rough_twist(prompts: list[str], texts: list[str]) -> list[float]:
    """Points the right way, and is wrong in size."""
    return [text.count("a") - 0.3 * text.count("b") + int(prompt) for prompt, text in zip(prompts, texts, strict=True)]


def smc(num_particles: int, **settings: Any) -> SequentialMonteCarlo:
    return SequentialMonteCarlo(num_particles, **{"tokens_per_step": 1, "twist": rough_twist, **settings})


def exact_samples(source: Any, number: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(source.posterior(0), number, replacement=True, generator=generator)
    return [list(source.outcomes()[i]) for i in drawn.tolist()]


def assert_mean(values: Tensor, expected: float) -> None:
    error = values.std().item() / math.sqrt(len(values))
    assert abs(values.mean().item() - expected) < 4 * error, (values.mean().item(), expected, error)


@pytest.mark.parametrize("proposal_seed", [None, 40], ids=["prior", "proposal"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"tokens_per_step": 2}, {"ess_threshold": 1.0}, {"twist": "rewards"}, {"twist": "target"}],
    ids=["twist", "two-tokens", "always-resample", "rewards", "no-twist"],
)
def test_the_evidence_is_unbiased(
    settings: dict[str, Any], proposal_seed: int | None, table_source: Any, rng: numpy.random.Generator
) -> None:
    source = table_source(Tilt(0.7), proposal_seed)
    runs = smc(4, **settings).run(source, torch.arange(2).repeat_interleave(2500), rng)
    resampled = runs.num_resamplings.double().mean().item()
    assert (resampled == 0) if settings.get("twist") == "target" else (resampled > 0.05)
    for p in range(2):
        assert_mean(runs.log_z[2500 * p : 2500 * (p + 1)].exp(), math.exp(source.log_z(p)))


@pytest.mark.parametrize("proposal_seed", [None, 40], ids=["prior", "proposal"])
def test_a_conditional_run_is_the_weighted_law(
    proposal_seed: int | None, table_source: Any, p_value: Any, rng: numpy.random.Generator
) -> None:
    """Given exact samples its law is Z_hat/Z times that of a run: E[1/Z_hat] = 1/Z, and its draws are exact."""
    source = table_source(Tilt(0.7), proposal_seed, num_prompts=1)
    method = smc(4, ess_threshold=0.9)
    references = exact_samples(source, 4000)
    runs = method.run(source, torch.zeros(4000, dtype=torch.int64), rng, references)
    assert runs.num_resamplings.double().mean() > 0.5
    assert [runs.finished.completion_ids[i] for i in runs.rows[:, 0].tolist()] == references
    assert_mean((-runs.log_z).exp(), math.exp(-source.log_z(0)))
    chosen = runs.rows.gather(1, systematic(runs.log_weights, 1, rng)).flatten()
    observed = source.frequencies(runs.finished.select(chosen).completion_ids)
    assert p_value(observed, source.posterior(0)) > 1e-4


@pytest.mark.parametrize("target", [Tilt(0.7), Constraint(threshold=1.0)], ids=["soft", "hard"])
def test_the_bounds_bracket_the_evidence(target: Any, table_source: Any, rng: numpy.random.Generator) -> None:
    source = table_source(target)
    method = smc(8, draws_per_run=1, upper_bound=True, max_log_potential=None if target.hard else 4 / 0.7)
    found = method.draw(source, 400, rng).diagnostics
    truth = (source.log_z(0) + source.log_z(1)) / 2
    lower, upper = found["log_z_lower"], found["log_z_upper"]
    if found["num_runs_without_evidence"]:  # their log Z_hat is -inf
        assert target.hard and lower["value_is"] == "-inf"
    else:
        assert truth - 0.3 < lower["value"] <= truth + 4 * lower["standard_error"]
    assert truth - 4 * upper["standard_error"] <= upper["value"] < truth + 0.3
    assert abs(found["log_z"]["value"] - truth) < 4 * found["log_z"]["standard_error"]


def test_the_gap_closes_with_particles(table_source: Any, rng: numpy.random.Generator) -> None:
    source = table_source(Tilt(0.7), num_prompts=1)
    gaps = []
    for size in (2, 8, 32):
        index = torch.zeros(600, dtype=torch.int64)
        lower = smc(size).run(source, index, rng).log_z.mean().item()
        upper = smc(size).run(source, index, rng, exact_samples(source, 600)).log_z.mean().item()
        assert lower < source.log_z(0) + 0.01 and upper > source.log_z(0) - 0.01
        gaps.append(upper - lower)
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]


def test_the_error_falls_with_particles(table_source: Any, p_value: Any, rng: numpy.random.Generator) -> None:
    source = table_source(Tilt(0.4), num_prompts=1)
    errors = []
    for size in (1, 4, 16, 64):
        draws = smc(size, draws_per_run=1).draw(source, 1500, rng)
        observed = source.frequencies(draws.completion_ids) / len(draws)
        errors.append((observed - source.posterior(0)).abs().sum().item() / 2)
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] and errors[3] < 0.05  # noise of 1,500 samples: about 0.02


@pytest.mark.parametrize("per_run", [None, 1])
def test_weighted_draws_of_few_particles_are_consistent(
    per_run: int | None, table_source: Any, rng: numpy.random.Generator
) -> None:
    source = table_source(Tilt(0.5), 40, num_prompts=1)
    draws = smc(2, draws_per_run=per_run).draw(source, 6000, rng)
    place = {row: i for i, row in enumerate(source.outcomes())}
    index = torch.tensor([place[tuple(row)] for row in draws.completion_ids])

    def error(weights: Tensor) -> float:
        law = torch.zeros(15, dtype=torch.float64).index_add_(0, index, weights.softmax(dim=0))
        return (law - source.posterior(0)).abs().sum().item() / 2

    assert error(draws.log_weights) < 0.05 < 0.1 < error(torch.zeros(6000, dtype=torch.float64))


def test_a_better_twist_costs_fewer_particles(table_source: Any, rng: numpy.random.Generator) -> None:
    """With psi = E[exp(phi) | what is written] only the next token is left to chance."""
    source = table_source(Tilt(0.3), num_prompts=1)
    rows, joint = source.outcomes(), source.log_unnormalized(0)

    def perfect(prompts: list[str], texts: list[str]) -> list[float]:
        values = []
        for text in texts:
            prefix = tuple("ab".index(letter) for letter in text)
            under = torch.tensor([row[: len(prefix)] == prefix for row in rows])
            mass = source.log_proposal(0)[under].logsumexp(dim=0)
            values.append((joint[under].logsumexp(dim=0) - mass).item())
        return values

    index = torch.zeros(300, dtype=torch.int64)
    spread = {
        name: smc(16, twist=twist).run(source, index, rng).log_z.exp().std().item()
        for name, twist in {"none": "target", "rough": rough_twist, "perfect": perfect}.items()
    }
    assert spread["perfect"] < 0.9 * spread["none"]


class Counting(Tilt):
    """A tilt that says what it knows of unfinished texts."""

    def partial_log_potential(self, prompts: list[str], texts: list[str]) -> Tensor:
        return torch.tensor(rough_twist(prompts, texts))


def test_the_twist_of_a_target(table_source: Any, rng: numpy.random.Generator) -> None:
    assert Counting(1.0).guesses_early and not Tilt(1.0).guesses_early
    assert not Product([Tilt(1.0), Constraint()]).guesses_early
    both = Product([Counting(1.0), Tilt(1.0), Product([Counting(2.0)])])
    assert both.guesses_early and both.partial_log_potential(["1"], ["ab"]).tolist() == pytest.approx([2 * 1.7])
    source = table_source(Counting(0.7))
    draws = SequentialMonteCarlo(8, tokens_per_step=1, ess_threshold=1.0).draw(source, 20, rng)
    assert draws.diagnostics["has_twist"] and draws.diagnostics["num_resamplings_per_run"] > 1
    plain = SequentialMonteCarlo(8, tokens_per_step=1).draw(table_source(Tilt(0.7)), 20, rng)
    assert not plain.diagnostics["has_twist"] and plain.diagnostics["num_resamplings_per_run"] == 0


def test_runs_without_evidence_give_no_draw(table_source: Any, rng: numpy.random.Generator) -> None:
    source = table_source(Constraint(threshold=3.5))  # impossible for the first prompt, aaa for the second
    draws = smc(4, draws_per_run=2).draw(source, 40, rng)
    assert set(draws.texts) == {"aaa"} and set(draws.prompt_index.tolist()) == {1}
    assert draws.diagnostics["num_runs_without_evidence"] == 40 - len(draws) / 2
    # a twist that knows what cannot become good ends particles early
    hopeless = smc(4, twist=lambda prompts, texts: [-math.inf] * len(texts))
    assert set(hopeless.draw(table_source(Tilt(0.7)), 4, rng).texts) == {""}  # what ended before it was asked


def test_draws_of_several_runs(table_source: Any, rng: numpy.random.Generator) -> None:
    source = table_source(Tilt(0.7))
    draws = smc(8).draw(source, 20, rng)
    assert torch.bincount(draws.prompt_index).tolist() == [20, 20] and draws.diagnostics["num_runs"] == 3
    assert [len(part.unique()) for part in draws.log_weights.split(20)] == [3, 3]


def test_systematic_resampling_follows_the_weights(rng: numpy.random.Generator) -> None:
    weights = torch.tensor([[0.05, 0.5, 0.0, 0.45]], dtype=torch.float64)
    counts = torch.stack(
        [torch.bincount(row, minlength=4) for row in systematic(weights.log().expand(4000, 4), 3, rng)]
    )
    assert (counts - 3 * weights).abs().max() < 1  # never further off
    assert (counts.double().mean(dim=0) - 3 * weights[0]).abs().max() < 0.03
    assert systematic(torch.full((2, 4), -math.inf), 3, rng).shape == (2, 3)


def test_conditional_resampling_is_systematic_resampling_given_its_first(rng: numpy.random.Generator) -> None:
    """The law of the counts, given that a place taken at random holds particle 0."""
    weights = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64).log()
    number = 20_000
    free: dict[tuple[int, ...], float] = {}
    for row in systematic(weights.expand(number, 3), 3, rng):
        counts = tuple(torch.bincount(row, minlength=3).tolist())
        free[counts] = free.get(counts, 0.0) + counts[0]  # as likely as 0 has copies
    conditional: dict[tuple[int, ...], float] = {}
    for _ in range(number // 4):
        chosen = conditional_systematic(weights, rng)
        assert chosen[0] == 0
        counts = tuple(torch.bincount(chosen, minlength=3).tolist())
        conditional[counts] = conditional.get(counts, 0.0) + 1
    total = sum(free.values())
    assert free.keys() >= conditional.keys()
    for counts, value in free.items():
        assert conditional.get(counts, 0) / (number // 4) == pytest.approx(value / total, abs=0.03)


def test_what_is_refused() -> None:
    for wrong in (
        {"num_particles": 0},
        {"tokens_per_step": 0},
        {"draws_per_run": 0},
        {"ess_threshold": 1.5},
        {"twist": "nonsense"},
    ):
        with pytest.raises(ValueError):
            SequentialMonteCarlo(**wrong)
    with pytest.raises(ValueError, match="would exclude some that can still become good"):
        SequentialMonteCarlo(twist="rewards").check(Constraint(), False)
    with pytest.raises(ValueError, match="set `max_log_potential`"):
        SequentialMonteCarlo(upper_bound=True).check(Tilt(1.0), False)
    SequentialMonteCarlo(upper_bound=True).check(Constraint(), True)


def test_no_exact_sample_for_the_upper_bound(table_source: Any, rng: numpy.random.Generator) -> None:
    draws = smc(4, upper_bound=True).draw(table_source(Constraint(threshold=99.0)), 4, rng)
    assert draws.diagnostics["log_z_upper"]["trusted"] is False
    assert Rejection().draw(table_source(Constraint(threshold=99.0)), 1, rng).diagnostics["num_attempts"] == 2000
