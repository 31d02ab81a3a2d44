"""The embedded benchmark: settings from the recipes, one short training, and its table from made-up numbers."""

import json
import math
from collections.abc import Iterator

import pytest
import torch
import yaml

from trl_bayes.assets import shipped_file
from trl_bayes.benchmarks.embedded import (
    EmbeddedRun,
    prior_evaluation,
    reference,
    steps,
    table,
    to_record,
    train,
    trainers,
)
from trl_bayes.benchmarks.learning_curve import Point
from trl_bayes.evaluation.evaluate import Evaluation
from trl_bayes.statistics.estimate import Estimate


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_settings_are_those_of_the_recipes() -> None:
    by_name = {setup.name: setup for setup in trainers()}
    for name, recipe in (("KLRLTrainer", "kl_rl"), ("DPGTrainer", "dpg")):
        said = yaml.safe_load(shipped_file(f"recipes/python_syntax/{recipe}.yaml").read_text(encoding="utf-8"))
        settings = by_name[name].settings
        assert settings.keys() <= said.keys() and all(settings[key] == said[key] for key in settings)
        assert said.keys() - settings.keys() == {"model_name_or_path", "dataset_name", "reward_funcs"}
        batch = said["per_device_train_batch_size"]
        assert steps(by_name[name], 10**9) == said["max_steps"] and steps(by_name[name], 3 * batch) == 3
        assert steps(by_name[name], 1) == 1
    ours, trl = by_name["KLRLTrainer"].settings, by_name["TRL RLOOTrainer"].settings
    differing = {key for key in trl if trl[key] != ours.get(key)}
    assert differing == {"learning_rate"} and trl["learning_rate"] == pytest.approx(
        ours["learning_rate"] / ours["beta"]
    )
    assert "target" not in by_name["TRL GRPOTrainer"].settings and by_name["DPGTrainer"].settings["target"]


@pytest.mark.parametrize("name", ["TRL GRPOTrainer", "FDPGTrainer jensen_shannon"])
def test_a_training_starts_at_the_prior_and_is_measured_at_its_end(name: str) -> None:
    posterior = reference(60)
    setup = next(setup for setup in trainers() if setup.name == name)
    run = train(
        setup,
        posterior,
        num_per_prompt=10,
        evaluate_at=[0, 1],
        max_steps=1,
        num_generations=2,
        per_device_train_batch_size=10,
    )
    assert [point.samples for point in run.curve] == [0, 10] and run.samples == 10
    start, end = (point.value for point in run.curve)
    log_z = prior_evaluation(posterior).metrics["log_z"].value
    assert start.value == pytest.approx(-log_z, abs=1e-5)  # KL(p||prior) of a constraint
    final = run.final.metrics["forward_kl"]  # with the policy's own samples as a control variate
    assert abs(final.value - end.value) < 3 * final.standard_error and end.value != start.value
    assert run.final.num_samples == 50 and run.final.metrics["reward"].value <= 1
    json.dumps(to_record(run), allow_nan=False)


def evaluation(parse: float, forward: float, trusted: bool = True) -> Evaluation:
    numbers = {"reward": parse, "total_variation": 0.2, "kl_prior": 0.3}
    estimates = {name: Estimate(value, 0.01) for name, value in numbers.items()}
    return Evaluation("x", {**estimates, "forward_kl": Estimate(forward, 0.02, trusted)})


def test_the_table() -> None:
    def run(method: str, seed: int, forward: float, trusted: bool = True) -> EmbeddedRun:
        return EmbeddedRun(
            "python-lines", method, seed, 4000, 2.0 + seed, evaluation(0.8 + seed / 10, forward, trusted)
        )

    runs = [run("A", 0, 0.25), run("A", 1, 0.35), run("B", 0, 0.3, trusted=False), run("C", 0, math.inf)]
    rows = table(runs, evaluation(0.7, 0.4)).splitlines()
    assert rows[2] == "| the prior | 0 | 70.0 ± 1.0 % | 0.400 ± 0.020 | 0.200 ± 0.010 | 0.300 ± 0.010 |  |"
    assert rows[3].startswith("| A | 4,000 | 85.0 ± 1.0 % (80.0 to 90.0) | 0.300 ± 0.020 (0.250 to 0.350) |")
    assert rows[3].endswith("| 2.5 |") and "| not reliable |" in rows[4] and "| ∞ |" in rows[5] and len(rows) == 6


def test_what_is_not_finite_is_strict_json() -> None:
    curve = (Point(0, 0.0, Estimate(math.inf)), Point(10, 1.0, Estimate(math.nan, trusted=False)))
    run = EmbeddedRun("python-lines", "A", 0, 10, 1.0, evaluation(1, math.inf), curve)
    first, second = json.loads(json.dumps(to_record(run), allow_nan=False))["curve"]
    assert first["forward_kl"]["value_is"] == "inf" and second["forward_kl"]["value"] is None
