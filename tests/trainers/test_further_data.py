"""`evaluate` on data that the trainer was not constructed with, for every trainer, before and after training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.helpers.trainers import QUIET, TRAINERS
from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.prior import PriorSamplesError


TASK = letter_count_task()
SETTINGS: dict[str, Any] = {
    **QUIET,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_generations": 4,
    "num_prior_samples": 20,
    "max_completion_length": TASK.max_completion_length,
    "max_steps": 1,
    "learning_rate": 1e-2,
}
BEST_OF_4 = {"name": "calibrated", "transform": "best_of_n", "n": 4}
# A trainer, and what it learns from samples of the prior: nothing, log Z, or quantiles of the reward and log Z
LEARNS_NOTHING = [("kl_rl", {}), ("tb", {})]
LEARNS = [
    ("dpg", {"partition": "prior_samples"}),
    ("ctrl", {}),
    ("xpo", {}),
    ("f_dpg", {"target": BEST_OF_4, "partition": "running"}),
]
Make = Callable[..., Any]


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """No two completions of the task are worth the same, so that calibrated targets do not warn of ties."""
    return [
        float(sum((ord(c) - 96) * 7.0**-i for i, c in enumerate(text.split()))) + 8.0**-9 * len(text)
        for text in completions
    ]


@pytest.fixture
def make(letters_prior: str, tmp_path: Path) -> Make:
    def build(kind: str, settings: dict[str, Any], **arguments: Any) -> Any:
        row = TRAINERS[kind]
        args = row.config(output_dir=str(tmp_path / "out"), **SETTINGS, **settings)
        return row.trainer(letters_prior, reward, args, Dataset.from_dict({"prompt": ["a"] * 8}), **arguments)

    return build


def other(*prompts: str) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts)})


def name(case: Any) -> str:
    return case if isinstance(case, str) else "-".join(str(v) for v in case.values() if isinstance(v, str)) or "all"


@pytest.mark.filterwarnings("ignore:.* share their reward with another:UserWarning")
@pytest.mark.parametrize(("kind", "settings"), [*LEARNS_NOTHING, *LEARNS], ids=name)
def test_before_the_first_update(kind: str, settings: dict[str, Any], make: Make) -> None:
    """And once more, when the trainer has learned of the prompts that it was given first."""
    trainer = make(kind, settings)
    for prompts in (("b", "c d"), ("b", "e")):
        metrics = trainer.evaluate(other(*prompts))
        assert metrics["eval_posterior/kl_prior"] == pytest.approx(0, abs=1e-5)
    trainer.train()


@pytest.mark.filterwarnings("ignore:.* share their reward with another:UserWarning")
@pytest.mark.parametrize(("kind", "settings"), LEARNS, ids=name)
def test_after_it_the_prior_cannot_be_sampled(kind: str, settings: dict[str, Any], make: Make) -> None:
    trainer = make(kind, settings, eval_dataset={"known": other("b")})
    trainer.train()
    assert "eval_reward" in trainer.evaluate(other("b", "a"))  # in other data, but not new
    with pytest.raises(PriorSamplesError, match="has been trained since: give the trainer all data as"):
        trainer.evaluate(other("b", "c d"))
    assert "eval_known_loss" in trainer.evaluate()  # which is as it was


@pytest.mark.parametrize(("kind", "settings"), LEARNS_NOTHING, ids=name)
def test_after_it_where_nothing_is_learned(kind: str, settings: dict[str, Any], make: Make) -> None:
    trainer = make(kind, settings)
    trainer.train()
    assert "eval_reward" in trainer.evaluate(other("b", "c d"))
    assert "eval_x_loss" in trainer.evaluate({"x": other("e")})


@pytest.mark.parametrize(("kind", "settings"), [LEARNS[2], LEARNS[3]], ids=name)
@pytest.mark.filterwarnings("ignore:.* share their reward with another:UserWarning")
def test_samples_that_are_kept_are_enough(kind: str, settings: dict[str, Any], make: Make, tmp_path: Path) -> None:
    shared = {**settings, "prior_samples_dir": str(tmp_path / "samples")}
    make(kind, shared, eval_dataset=other("b")).evaluate()
    trainer = make(kind, shared)
    trainer.train()
    before = trainer.target.state_dict()
    assert "eval_reward" in trainer.evaluate(other("b"))
    for key, value in before.items():  # of the training data's prompt, as it was
        now = trainer.target.state_dict()[key]
        assert all(any(bool((row == one).all()) for one in now) for row in value)


def test_what_cannot_be_evaluated_on_is_refused_before(make: Make) -> None:
    trainer = make("xpo", {})
    for data, words in (
        (other("a").to_iterable_dataset(), "use a data set that is not streamed"),
        (other(""), "prompt"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer.evaluate(data)
    trainer.train()
