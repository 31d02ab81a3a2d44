"""The demonstrations section: the expert is a table and so can be cloned; what is measured is what theory says."""

import json
import math
from pathlib import Path

import pytest
import torch

from trl_bayes import cli
from trl_bayes.benchmarks.demonstrations import measure
from trl_bayes.benchmarks.table_policies import (
    SUCCESS,
    Budget,
    ChainTask,
    chain_task,
    clone,
    draw_demonstrations,
    regularized_rl,
    slope,
)


@pytest.fixture(scope="module")
def task() -> ChainTask:
    return chain_task()


def test_the_expert_is_a_table_that_succeeds_as_often_as_it_should(task: ChainTask) -> None:
    assert task.rewards.sum() == 4 and task.log_probs(task.prior).exp().sum() == pytest.approx(1, abs=1e-12)
    assert (task.log_probs(task.prior).exp() * task.rewards).sum() == pytest.approx(4 * 5**-6)
    # Cloned from all of its completions by their probabilities, it is met exactly
    counts = task.counts(task.log_expert.exp())
    table = (counts / counts.sum(dim=1, keepdim=True)).log()
    torch.testing.assert_close(task.log_probs(table), task.log_expert, rtol=0, atol=1e-10)
    assert task.suboptimality(table) == pytest.approx(1 - SUCCESS) and abs(task.kl_from_expert(table)) < 1e-10


def test_floors(task: ChainTask) -> None:
    drawn = draw_demonstrations(task, 50, seed=0)
    assert task.kl_from_expert(clone(task, drawn)) == math.inf
    # M of the prior: no completion has less than M / (N + M) of its probability under the prior, state by state
    counts = task.counts(torch.bincount(drawn, minlength=len(task.ids)).double())
    visits = task.counts(task.log_probs(task.prior).exp()).sum(dim=1, keepdim=True)  # (S, 1) of one completion
    table = clone(task, drawn, prior_completions=10).exp()
    least = 10 * visits / (10 * visits + counts.sum(dim=1, keepdim=True)) * task.prior.exp()  # NaN: nobody comes there
    assert (table >= least.nan_to_num() - 1e-12).all()
    one = clone(task, drawn, one_count=1).exp()
    assert (one >= 1 / (counts.sum(dim=1, keepdim=True) + 5) - 1e-12).all()
    assert task.kl_from_expert(one.log()) < 3


def test_kl_falls_as_one_over_n(task: ChainTask) -> None:
    numbers = [100, 300, 1000]
    kl = [
        sum(task.kl_from_expert(clone(task, draw_demonstrations(task, n, seed), one_count=1)) for seed in range(5)) / 5
        for n in numbers
    ]
    assert -1.1 < slope(numbers, kl) < -0.9


def test_rl_reaches_the_posterior_of_the_clone(task: ChainTask) -> None:
    """With a large budget: the tilt of the clone by the reward, at the temperature."""
    start = clone(task, draw_demonstrations(task, 100, seed=0), one_count=1)
    chance = 1 - task.suboptimality(start)
    found = 1 - task.suboptimality(regularized_rl(task, start, 0.5, Budget(steps=200, batch=128), seed=0))
    odds = chance / (1 - chance) * math.exp(1 / 0.5)
    assert found == pytest.approx(odds / (1 + odds), abs=0.02)


def test_demonstrations_help_where_the_prior_finds_nothing(task: ChainTask) -> None:
    row = measure(task, 100, 0, Budget())
    best = min(row.trained.values())
    assert best < 0.1 < row.cloned < 0.7
    assert task.suboptimality(regularized_rl(task, task.prior, 0.01, Budget(), seed=0)) > 0.99


def test_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path)
    cli.main(
        ["bench", "demonstrations", "--numbers", "10", "20", "--seeds", "0", "--steps", "2", "--output_dir", folder]
    )
    record = json.loads((tmp_path / "demonstrations.json").read_text())["demonstrations"]
    assert [row["number"] for row in record["rows"]] == [10, 20] and record["rows"][0]["kl"]["none"] is None
    assert (tmp_path / "demonstrations.png").read_bytes()[:4] == b"\x89PNG"
    assert "| RL, rule, ε = 0.1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["bench", "demonstrations", "--numbers", "1", "--output_dir", folder])
    assert "2 or more" in capsys.readouterr().err
