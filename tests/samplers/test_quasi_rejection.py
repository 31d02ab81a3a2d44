"""Quasi-rejection: its law is min(P, B q), its error within its bound, and its estimates those of enumeration."""

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from trl_bayes.samplers import QuasiRejection, trade_off
from trl_bayes.samplers.quasi_rejection import smallest_bound
from trl_bayes.targets import Constraint, Tilt


def laws(source: Any, prompt: int, log_bound: float) -> tuple[Tensor, float, float, float]:
    """p_B, its total variation from p, the bound on it, and the acceptance rate, all exact."""
    log_q, log_p = source.log_proposal(prompt), source.log_unnormalized(prompt)
    kept = torch.minimum(log_p, log_bound + log_q)
    p, p_b = log_p.softmax(dim=0), kept.softmax(dim=0)
    above = p[log_p > log_bound + log_q].sum().item()
    return p_b, (p - p_b).abs().sum().item() / 2, above, (kept.logsumexp(dim=0) - log_bound).exp().item()


@pytest.mark.parametrize("proposal_seed", [None, 40])
@pytest.mark.parametrize("log_bound", [0.0, 1.0, 2.5, 6.0])
def test_the_law_and_its_error(
    log_bound: float, proposal_seed: int | None, table_source: Any, p_value: Any, rng: numpy.random.Generator
) -> None:
    source = table_source(Tilt(0.7), proposal_seed, num_prompts=1)
    draws = QuasiRejection(log_bound).draw(source, 10_000, rng)
    law, error, bound, acceptance = laws(source, 0, log_bound)
    assert error <= bound
    observed = source.frequencies(draws.completion_ids)
    assert p_value(observed, law) > 1e-4  # fails once in 10,000
    measured = (observed / observed.sum() - source.posterior(0)).abs().sum().item() / 2
    assert measured <= bound + 0.02  # 15 outcomes and 10,000 samples: about 0.01 of noise
    estimate = draws.diagnostics["total_variation_bound"]
    assert abs(estimate["value"] - bound) <= 4 * estimate["standard_error"] + 1e-12
    assert draws.diagnostics["acceptance_rate"]["mean"] == pytest.approx(acceptance, rel=0.08)
    # the weights correct what is left
    place = {row: i for i, row in enumerate(source.outcomes())}
    index = torch.tensor([place[tuple(row)] for row in draws.completion_ids])
    weighted = torch.zeros(15, dtype=torch.float64).index_add_(0, index, draws.log_weights.softmax(dim=0))
    assert (weighted - source.posterior(0)).abs().sum() / 2 < 0.03


def test_the_trade_off_is_exact_on_all_outcomes(table_source: Any) -> None:
    """On a sample in which every outcome occurs as often as q says, the estimates are sums over outcomes."""
    source = table_source(Tilt(0.7), 40, num_prompts=1)
    counts = (source.log_proposal(0).exp() * 1e6).round().long()
    weights = source.all_candidates(0).log_weights.repeat_interleave(counts)
    bounds = torch.tensor([-1.0, 0.5, 2.0, 8.0], dtype=torch.float64)
    points = trade_off(weights, bounds)
    for point, log_bound in zip(points, bounds.tolist(), strict=True):
        _, error, bound, acceptance = laws(source, 0, log_bound)
        assert point.log_bound == log_bound
        assert point.total_variation == pytest.approx(error, abs=1e-4)
        assert point.total_variation_bound == pytest.approx(bound, abs=1e-4)
        assert point.acceptance_rate == pytest.approx(acceptance, abs=1e-4)
        assert point.total_variation <= point.total_variation_bound + 1e-12
    assert [p.acceptance_rate for p in points] == sorted([p.acceptance_rate for p in points], reverse=True)
    assert [p.total_variation for p in points] == sorted([p.total_variation for p in points], reverse=True)


def test_the_standard_error_of_the_bound(table_source: Any) -> None:
    source = table_source(Tilt(0.7), num_prompts=1)
    q, weights = source.log_proposal(0).exp(), source.all_candidates(0).log_weights
    generator = torch.Generator().manual_seed(0)
    samples = torch.multinomial(q, 200 * 500, replacement=True, generator=generator).view(200, 500)
    points = [trade_off(weights[row], torch.tensor([1.0]))[0] for row in samples]
    values = torch.tensor([point.total_variation_bound for point in points])
    errors = torch.tensor([point.standard_error for point in points])
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.15)


def test_the_chosen_bound_is_the_smallest_within_tolerance() -> None:
    weights = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1], dtype=torch.float64).log()
    assert smallest_bound(weights, 0.39).exp().item() == pytest.approx(0.4)
    assert smallest_bound(weights, 0.4).exp().item() == pytest.approx(0.2)
    assert smallest_bound(weights, 0.8).exp().item() == pytest.approx(0.1)
    assert smallest_bound(weights, 0.0).exp().item() == pytest.approx(0.4)
    assert smallest_bound(torch.full((3,), -math.inf), 0.1).isnan()


def test_by_default_the_error_is_within_the_tolerance(table_source: Any, rng: numpy.random.Generator) -> None:
    source = table_source(Tilt(0.7), 40)
    draws = QuasiRejection(tolerance=0.05, num_pilot=4000).draw(source, 20, rng)
    assert len(draws) == 40 and draws.diagnostics["log_bound"]["mean"] is not None
    curve = draws.diagnostics["trade_off"]
    assert [point["quantile"] for point in curve] == sorted(point["quantile"] for point in curve)
    assert curve[-1]["total_variation_bound"] == 0.0
    source = table_source(Tilt(0.7), 40)
    exact = QuasiRejection(tolerance=0.05, num_pilot=4000)._log_bounds(source)
    for p in range(2):
        assert laws(source, p, exact[p].item())[2] <= 0.05 + 0.03  # the pilot's own error


def test_prompts_without_evidence_are_left_out(table_source: Any, rng: numpy.random.Generator) -> None:
    source = table_source(Constraint(threshold=3.5))  # impossible for the first prompt
    draws = QuasiRejection().draw(source, 5, rng)
    assert draws.prompt_index.tolist() == [1] * 5 and draws.diagnostics["num_without_bound"] == 1
    nothing = QuasiRejection().draw(table_source(Constraint(threshold=99.0)), 5, rng)
    assert len(nothing) == 0 and "total_variation_bound" not in nothing.diagnostics


def test_what_is_refused() -> None:
    for wrong in ({"log_bound": math.inf}, {"tolerance": 1.0}, {"tolerance": -0.1}, {"num_pilot": 0}):
        with pytest.raises(ValueError):
            QuasiRejection(**wrong)
