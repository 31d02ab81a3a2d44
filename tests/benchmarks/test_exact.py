"""The section of exact tasks: its jobs, the same in one process and in two, and its tables from made-up runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from trl_bayes import cli
from trl_bayes.benchmarks.enumeration import PolicyFit
from trl_bayes.benchmarks.exact import ExactArguments, curve_tables, jobs, table, to_record
from trl_bayes.benchmarks.exact_training import ExactRun
from trl_bayes.benchmarks.learning_curve import Point


def fit(forward: float, reverse: float = 0.5) -> PolicyFit:
    return PolicyFit(forward, reverse, 0.25, 1.0, 2.0, 0.125)


def test_tables_are_means_over_seeds() -> None:
    def run(method: str, seed: int, forward: float, seconds: float) -> ExactRun:
        curve = (Point(0, 0.0, fit(1.0)), Point(64, seconds / 2, fit(2 * forward)))
        return ExactRun("letters", method, seed, 128, seconds, fit(forward), curve)

    runs = [run("A", 0, 0.25, 3.0), run("A", 1, 0.75, 5.0), run("B", 0, 0.1, 1.0)]
    rows = table(runs).splitlines()
    assert rows[2] == "| letters | A | 128 | 0.5000 | 0.7500 | 0.5000 | 0.2500 | 0.1250 | 4.0 |"
    assert rows[3].startswith("| letters | B | 128 | 0.1000 |") and len(rows) == 4
    curves = curve_tables(runs).splitlines()
    assert curves[0] == "| letters: KL(p‖π) after | 0 | 64 |"
    assert curves[2:] == ["| A | 1.0000 | 1.0000 |", "| B | 1.0000 | 0.2000 |"]


def test_an_infinite_divergence_is_null_and_shown_as_such() -> None:
    outside = ExactRun("hard-20k", "A", 0, 64, 1.0, fit(0.1, math.inf), (Point(64, 1.0, fit(0.1, math.inf)),))
    record = json.loads(json.dumps(to_record(outside), allow_nan=False))
    assert record["fit"]["reverse_kl"] is None and record["fit"]["forward_kl"] == 0.1
    assert record["curve"] == [{"samples": 64, "seconds": 1.0, **record["fit"]}]
    assert "| 0.1000 | 0.1000 | ∞ |" in table([outside])


def test_jobs_are_problems_by_trainers_by_seeds() -> None:
    args = ExactArguments(problems=["letters", "hard-20k", "letters"], methods=["RLOO", "DPG"], seeds=[0, 4, 0])
    every = jobs(args)
    assert len(every) == 2 * (4 + 4)  # RLOO, DPG and two of f-DPG on either
    settings = [job.keywords for job in every]  # type: ignore[attr-defined]
    assert {one["seed"] for one in settings} == {0, 4} and {one["max_steps"] for one in settings} == {80, 640}
    assert all(one["evaluate_at"][0] == 0 and one["evaluate_at"][-1] == one["max_steps"] for one in settings)
    full = jobs(ExactArguments(problems=["letters"], samples=102_400))
    assert {job.keywords["max_steps"] for job in full} == {400}  # type: ignore[attr-defined]
    assert jobs(ExactArguments(device="cuda"))[0].keywords["use_cpu"] is False  # type: ignore[attr-defined]


@pytest.mark.slow
def test_trainings_in_two_processes_are_those_of_one(tmp_path: Path) -> None:
    def fits(folder: str, *flags: str) -> list[Any]:
        arguments = ["--problems", "letters", "--methods", "RLOO", "KLRL", "--samples", "256", "--seeds", "0"]
        cli.main(["bench", "exact", *arguments, *flags, "--output_dir", str(tmp_path / folder)])
        runs = json.loads((tmp_path / folder / "bench.json").read_text())["exact"]
        return [(run["method"], run["fit"]["forward_kl"]) for run in runs]

    alone, together = fits("one", "--num_parallel", "1"), fits("two")
    assert [name for name, _ in alone] == [name for name, _ in together] == ["TRL RLOOTrainer", "KLRLTrainer"]
    assert [value for _, value in together] == pytest.approx([value for _, value in alone], rel=1e-4)


def test_refusals() -> None:
    for fields, sentence in (
        ({"problems": ["leters"]}, r"'leters' is not one of letters, bigrams, balance, hard-20k, hard-100k \(did you"),
        ({"problems": ["hard-20k"], "methods": ["KLRL"]}, "no trainer's name has 'KLRL' in it"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ExactArguments(**fields)  # type: ignore[arg-type]
