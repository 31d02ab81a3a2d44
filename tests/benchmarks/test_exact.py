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
from trl_bayes.statistics.strict_json import strict_json


def fit(forward: float, reverse: float = 0.5) -> PolicyFit:
    return PolicyFit(forward, reverse, 0.25, 1.0, 2.0, 0.125)


def test_tables_are_over_seeds() -> None:
    def run(method: str, seed: int, forward: float, seconds: float) -> ExactRun:
        curve = (Point(0, 0.0, fit(1.0)), Point(64, seconds / 2, fit(2 * forward)))
        return ExactRun("letters", method, seed, 128, seconds, fit(forward), curve)

    runs = [run("A", 0, 0.25, 3.0), run("A", 1, 0.75, 5.0), run("B", 0, 0.1, 1.0)]
    rows = table(runs).splitlines()
    assert rows[2] == "| letters | A | 128 | 0.5000 | 0.7500 |  | 0.5000 | 0.2500 | 0.1250 | 4.0 |"
    assert rows[3].startswith("| letters | B | 128 | 0.1000 |") and len(rows) == 4
    curves = curve_tables(runs).splitlines()
    assert curves[0] == "| letters: KL(p‖π) after | 0 | 64 |"
    assert curves[2:] == ["| A | 1.0000 | 1.0000 |", "| B | 1.0000 | 0.2000 |"]


def test_an_infinite_divergence_is_null_and_shown_as_such() -> None:
    outside = ExactRun("hard-20k", "A", 0, 64, 1.0, fit(0.1, math.inf), (Point(64, 1.0, fit(0.1, math.inf)),))
    record = json.loads(json.dumps(strict_json(to_record(outside)), allow_nan=False))
    assert record["fit"]["reverse_kl"] is None and record["fit"]["forward_kl"] == 0.1
    assert record["curve"] == [{"samples": 64, "seconds": 1.0, **record["fit"]}]
    assert "| 0.1000 | 0.1000 |  | ∞ |" in table([outside])


def test_trainers_are_multiples_of_the_limit_of_their_own_divergence() -> None:
    """Median, smallest and largest of three seeds; a trainer of another divergence has another limit."""
    ends = {"noise-free reverse_kl": [0.02], "noise-free forward_kl": [0.01], "DPGTrainer": [0.02, 0.08, 0.04]}
    ends["KLRLTrainer"] = [0.05]
    runs = [
        ExactRun("letters", method, seed, 64, 1.0, fit(value), ())
        for method, values in ends.items()
        for seed, value in enumerate(values)
    ]
    cells = {row.split(" | ")[1]: row.split(" | ")[5] for row in table(runs).splitlines()[2:]}
    assert cells["DPGTrainer"] == "4.00 (2.00 to 8.00)" and cells["KLRLTrainer"] == "2.50"
    assert cells["noise-free reverse_kl"] == ""


def test_jobs_are_problems_by_trainers_by_seeds() -> None:
    args = ExactArguments(problems=["letters", "hard-20k", "letters"], methods=["RLOO", "DPG"], seeds=[0, 4, 0])
    every = jobs(args)
    # RLOO, DPG and two of f-DPG on either with two seeds, and a limit for each of their three divergences on letters
    assert len(every) == 2 * (2 * 4) + 3
    settings = [job.keywords for job in every]  # type: ignore[attr-defined]
    assert [one.get("seed") for one in settings[:5]] == [None, None, None, 0, 4] and {
        one["max_steps"] for one in settings
    } == {80, 640}
    assert all(one["evaluate_at"][0] == 0 and one["evaluate_at"][-1] == one["max_steps"] for one in settings)
    full = jobs(ExactArguments(problems=["letters"], samples=102_400))
    assert {job.keywords["max_steps"] for job in full} == {400}  # type: ignore[attr-defined]
    assert len(full) == 3 + 7 * 5
    replay = jobs(ExactArguments(problems=["letters", "hard-20k"], methods=["replay"], seeds=[0]))
    assert len(replay) == (3 + 3) + 2  # on letters each trainer has a divergence of its own, and a limit
    often = jobs(ExactArguments(problems=["letters"], methods=["updates"], seeds=[0], samples=102_400))
    assert [job.keywords["max_steps"] for job in often] == [400, 400, 1600, 1600]  # type: ignore[attr-defined]
    small = jobs(ExactArguments(problems=["letters"], methods=["batches"], seeds=[0], samples=102_400))
    assert [job.keywords["max_steps"] for job in small] == [400] * 3 + [1600] * 8  # type: ignore[attr-defined]
    setups = [job.args[1] for job in small[3:]]  # type: ignore[attr-defined]
    assert {setup.settings["per_device_train_batch_size"] for setup in setups} == {64}
    named = jobs(ExactArguments(problems=["letters"], methods=["KLRLTrainer, quarter"], seeds=[0]))
    assert [job.args[1].name for job in named[1:]] == [  # type: ignore[attr-defined]
        "KLRLTrainer, quarter batches",
        "KLRLTrainer, quarter batches, four at once",
    ]
    mixed = jobs(ExactArguments(problems=["letters"], methods=["prior"], seeds=[0]))
    assert len(mixed) == 2 + 2 * 3
    large = jobs(ExactArguments(problems=["hard-20k"], methods=["replay"], seeds=[0], largest_limit=20_000))
    assert len(large) == 2 + 2
    pairs = jobs(ExactArguments(problems=["letters"], methods=["XPO"], seeds=[0, 1], samples=102_400))
    assert [job.args[1].name for job in pairs[1:]] == ["XPO, all pairs"] * 2 + ["XPO, fresh pairs"] * 2  # type: ignore[attr-defined]
    assert jobs(ExactArguments(device="cuda"))[0].keywords["use_cpu"] is False  # type: ignore[attr-defined]


@pytest.mark.slow
def test_trainings_in_two_processes_are_those_of_one(tmp_path: Path) -> None:
    def fits(folder: str, *flags: str) -> list[Any]:
        arguments = ["--problems", "letters", "--methods", "RLOO", "KLRL", "--samples", "256", "--seeds", "0"]
        cli.main(["bench", "exact", *arguments, *flags, "--output_dir", str(tmp_path / folder)])
        runs = json.loads((tmp_path / folder / "bench.json").read_text())["exact"]
        return [(run["method"], run["fit"]["forward_kl"]) for run in runs]

    alone, together = fits("one", "--num_parallel", "1"), fits("two")
    names = ["noise-free reverse_kl", "TRL RLOOTrainer", "KLRLTrainer"]
    assert [name for name, _ in alone] == [name for name, _ in together] == names
    assert [value for _, value in together] == pytest.approx([value for _, value in alone], rel=1e-4)


def test_refusals() -> None:
    for fields, sentence in (
        ({"problems": ["leters"]}, r"'leters' is not one of letters, bigrams, balance, hard-20k, hard-100k \(did you"),
        ({"problems": ["hard-20k"], "methods": ["KLRL"]}, "no trainer's name has 'KLRL' in it"),
        ({"problems": ["hard-20k"], "methods": ["XPO"]}, "no trainer's name has 'XPO' in it"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ExactArguments(**fields)  # type: ignore[arg-type]
