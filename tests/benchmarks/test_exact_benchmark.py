"""The exact benchmark: budgets, one short run with its curve, and its tables and records from made-up runs."""

import json
import math

import pytest
import torch

from trl_bayes.benchmarks.enumeration import PolicyFit
from trl_bayes.benchmarks.exact_benchmark import (
    Run,
    curves_to_markdown,
    methods,
    problems,
    to_markdown,
    to_record,
    train,
)
from trl_bayes.benchmarks.learning_curve import Point


def fit(forward: float, reverse: float = 0.5) -> PolicyFit:
    return PolicyFit(forward, reverse, 0.25, 1.0, 2.0, 0.125)


def test_budgets() -> None:
    known = problems()
    assert known["letters"].steps(20_480) == 80 and known["letters"].steps(10**9) == 400
    assert known["hard-20k"].steps(10**9) * 32 == 20_480 and known["hard-20k"].steps(64) == 2
    assert known["letters"].steps(1) == 1


def test_both_of_trls_trainers_are_on_every_problem() -> None:
    for problem in problems().values():
        names = [method.name for method in methods(problem)]
        assert names[:2] == ["TRL GRPOTrainer", "TRL RLOOTrainer"] and len(set(names)) == len(names)
        assert ("KLRLTrainer" in names) is not problem.target.hard


@pytest.mark.parametrize(("problem", "name"), [("letters", "DPGTrainer"), ("hard-20k", "TRL RLOOTrainer")])
def test_a_run_ends_where_its_curve_ends(problem: str, name: str) -> None:
    """Two steps: from the prior's own divergence, known by enumeration, towards the posterior."""
    torch.set_num_threads(1)
    chosen = problems()[problem]
    method = next(method for method in methods(chosen) if method.name == name)
    run = train(chosen, method, seed=1, evaluate_at=[0, 2], max_steps=2)
    batch = 256 if problem == "letters" else 32
    assert [point.samples for point in run.curve] == [0, 2 * batch] and run.samples == 2 * batch
    start, end = (point.value for point in run.curve)
    prior = {"letters": 0.941, "hard-20k": 2.481}[problem]
    assert start.forward_kl == pytest.approx(prior, abs=1e-3) and start.kl_prior == pytest.approx(0, abs=1e-9)
    assert end == run.fit and end.forward_kl < start.forward_kl - 0.05
    assert 0 < run.curve[1].seconds <= run.seconds


def test_tables_are_means_over_seeds() -> None:
    def run(method: str, seed: int, forward: float, seconds: float) -> Run:
        curve = (Point(0, 0.0, fit(1.0)), Point(64, seconds / 2, fit(2 * forward)))
        return Run("letters", method, seed, 128, seconds, fit(forward), curve)

    runs = [run("A", 0, 0.25, 3.0), run("A", 1, 0.75, 5.0), run("B", 0, 0.1, 1.0)]
    rows = to_markdown(runs).splitlines()
    assert rows[2] == "| letters | A | 128 | 0.5000 | 0.7500 | 0.5000 | 0.2500 | 0.1250 | 4.0 |"
    assert rows[3].startswith("| letters | B | 128 | 0.1000 |") and len(rows) == 4
    curves = curves_to_markdown(runs).splitlines()
    assert curves[0] == "| letters: KL(p‖π) after | 0 | 64 |"
    assert curves[2:] == ["| A | 1.0000 | 1.0000 |", "| B | 1.0000 | 0.2000 |"]


def test_an_infinite_divergence_is_null_and_shown_as_such() -> None:
    outside = Run("hard-20k", "A", 0, 64, 1.0, fit(0.1, math.inf), (Point(64, 1.0, fit(0.1, math.inf)),))
    record = json.loads(json.dumps(to_record(outside), allow_nan=False))
    assert record["fit"]["reverse_kl"] is None and record["fit"]["forward_kl"] == 0.1
    assert record["curve"] == [{"samples": 64, "seconds": 1.0, **record["fit"]}]
    assert "| 0.1000 | 0.1000 | ∞ |" in to_markdown([outside])
