"""The exploration section: its tasks are what it says, another proposal finds the best completion, and its page."""

import json
from pathlib import Path

import pytest
import torch

from trl_bayes import cli
from trl_bayes.benchmarks.exploration import BEST, log_probs, methods, run_method, tree, two_arms


@pytest.mark.parametrize("task", [two_arms(), tree()], ids=lambda task: task.name)
def test_the_prior_all_but_misses_the_best_completion(task: object) -> None:
    log_prior, rewards = task.log_prior, task.rewards  # type: ignore[attr-defined]
    best = task.best  # type: ignore[attr-defined]
    assert log_prior.exp().sum() == pytest.approx(1.0)
    assert log_prior[best].exp() == pytest.approx(BEST, rel=0.05)
    assert rewards.argmax() == best and rewards[best] == 1 and rewards.sort().values[-2] <= 0.2
    posterior = task.log_posterior.exp()  # type: ignore[attr-defined]
    assert posterior.sum() == pytest.approx(1.0) and posterior.argmax() == best


def test_probabilities_of_a_tree_are_products() -> None:
    task = tree(branches=3, depth=2)
    first, second = (logits.softmax(dim=1) for logits in task.levels)
    expected = (first[0].unsqueeze(1) * second).flatten()
    torch.testing.assert_close(log_probs(task.levels).exp(), expected)


def test_another_proposal_finds_it_and_plain_gradients_of_the_bonus_do_not() -> None:
    named = {method.name: method for method in methods()}
    defended, plain = (
        run_method(two_arms(), named[name], seed=0, iterations=30)
        for name in ("no bonus, 25 % uniform proposal", "alpha 1 to 0, SGD")
    )
    assert defended.found and defended.best == pytest.approx(1.0, abs=0.01)
    assert plain.best < 0.01


def test_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["bench", "exploration", "--seeds", "0", "--iterations", "1", "--output_dir", str(tmp_path)])
    page = (tmp_path / "exploration.md").read_text()
    assert "## Exploration" in capsys.readouterr().out
    assert page.count("| no bonus |") == 2
    records = json.loads((tmp_path / "exploration.json").read_text())["exploration"]
    assert len(records) == 2 * len(methods())
    assert (tmp_path / "exploration.png").stat().st_size > 1000


def test_refuses_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "exploration", "--iterations", "0", "--output_dir", str(tmp_path)])
    assert "`iterations` and the number of `seeds` must be at least 1" in capsys.readouterr().err
