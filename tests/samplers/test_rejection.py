"""Rejection is exact, stops at its budget, and refuses what has no bound.

Chi-square tests have fixed seeds and accept p-values above 1e-4: a correct sampler with another seed would fail once
in 10,000.
"""

import math
from typing import Any

import numpy
import pytest
import torch

from trl_bayes.samplers import Rejection
from trl_bayes.samplers.rejection import accept_until
from trl_bayes.targets import Constraint, Target, Tilt


NUM = 10_000
BOUND = (3 + 1) / 0.7  # of the tilt: three a's, and one for the second prompt


@pytest.mark.parametrize(
    ("target", "bound"), [(Tilt(0.7), BOUND), (Constraint(threshold=1.0), None)], ids=["soft", "hard"]
)
def test_samples_are_exact(
    target: Target, bound: float | None, table_source: Any, p_value: Any, rng: numpy.random.Generator
) -> None:
    source = table_source(target)
    draws = Rejection(bound).draw(source, NUM, rng)
    assert torch.bincount(draws.prompt_index).tolist() == [NUM, NUM]
    assert not draws.log_weights.any() and draws.phi.isfinite().all()
    for p in range(2):
        observed = source.frequencies(source.of_prompt(draws, p))
        assert p_value(observed, source.posterior(p)) > 1e-4
        # the test sees another law
        assert p_value(observed, source.log_proposal(p).exp()) < 1e-4
        assert p_value(observed, (source.log_unnormalized(p) * 1.2).softmax(dim=0)) < 1e-4
    log_z = draws.diagnostics["log_z"]
    truth = (source.log_z(0) + source.log_z(1)) / 2
    assert log_z["trusted"] and abs(log_z["value"] - truth) < 4 * log_z["standard_error"]
    rates = [math.exp(source.log_z(p) - (bound or 0.0)) for p in range(2)]
    assert draws.diagnostics["acceptance_rate"]["mean"] == pytest.approx(sum(rates) / 2, rel=0.1)


def test_it_is_exact_however_few_are_drawn_at_a_time(
    table_source: Any, p_value: Any, rng: numpy.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds that end early for some prompts do not prefer what is accepted early."""
    monkeypatch.setattr("trl_bayes.samplers.rejection._MOST_PER_ROUND", 2)
    source = table_source(Tilt(0.7), num_prompts=1)
    observed = sum(
        source.frequencies(Rejection(BOUND - 1 / 0.7).draw(source, 2, rng).completion_ids) for _ in range(400)
    )
    assert p_value(observed, source.posterior(0)) > 1e-4


def test_a_budget_that_is_used_up_gives_fewer_draws(table_source: Any, rng: numpy.random.Generator) -> None:
    source = table_source(Constraint(threshold=3.5))  # impossible for the first prompt, aaa for the second
    draws = Rejection(max_attempts=50).draw(source, 10, rng)
    assert draws.prompt_index.tolist() == [1] * len(draws) and draws.texts == ["aaa"] * len(draws)
    assert draws.diagnostics["acceptance_rate"]["min"] == 0.0
    assert source.num_generated == draws.diagnostics["num_attempts"] <= 1000
    nothing = Rejection(max_attempts=3).draw(table_source(Constraint(threshold=9.0)), 5, rng)
    assert len(nothing) == 0 and nothing.diagnostics["log_z"]["value_is"] == "-inf"


def test_attempts_are_no_more_than_needed(table_source: Any, rng: numpy.random.Generator) -> None:
    source = table_source(Tilt(1e9))  # everything is accepted
    found = accept_until(source, torch.tensor([30, 0]), lambda c: torch.zeros(len(c)), 1000, rng)
    assert found.attempts[1] == 0 and 30 <= found.attempts[0] < 100


def test_what_is_refused(table_source: Any, rng: numpy.random.Generator) -> None:
    with pytest.raises(ValueError, match="set `max_log_potential`"):
        Rejection().check(Tilt(1.0), has_proposal=False)
    with pytest.raises(ValueError, match="draws from the prior"):
        Rejection().check(Constraint(), has_proposal=True)
    with pytest.raises(ValueError, match="above `max_log_potential=0.1`"):
        Rejection(0.1).draw(table_source(Tilt(1.0)), 100, rng)
    for wrong in ({"max_log_potential": math.inf}, {"max_log_potential": math.nan}, {"max_attempts": 0}):
        with pytest.raises(ValueError):
            Rejection(**wrong)
