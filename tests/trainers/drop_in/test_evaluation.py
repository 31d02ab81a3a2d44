"""Evaluation while training: all metrics, and no trace in what training does."""

import math

import pytest
import torch
from datasets import DatasetDict

from tests.helpers.training import assert_same_weights
from tests.trainers.drop_in.runs import (
    GENERATION_METRICS,
    METRICS,
    OF_Z,
    SCORED,
    G,
    Make,
    assert_finite,
    close,
    conversational,
    learn,
    plain,
    record,
    script,
)


@pytest.mark.filterwarnings("ignore:With `num_generations_eval=1`:UserWarning")
@pytest.mark.parametrize("num_generations_eval", [None, 1, 2])
def test_evaluation_while_training(num_generations_eval: int | None, kind: str, make: Make) -> None:
    config = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "num_generations_eval": num_generations_eval,
        "per_device_eval_batch_size": 2 * G,
        "partition": "leave_one_out",
    }
    trainer = make(kind, config, eval_dataset=plain())
    recorded = record(trainer)
    learn(trainer)
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 3
    names = {f"eval_{name}" for name in [*METRICS, *GENERATION_METRICS, "loss"]} - {"eval_step_time"}
    for log in evaluations:
        assert_finite(log, names)
        # A completion alone cannot tell Z, and no other group of its prompt is kept
        assert {name for name in OF_Z if f"eval_{name}" in log} == (set() if num_generations_eval == 1 else set(OF_Z))
    if num_generations_eval is not None:  # groups are of this size: Z is that of the one sibling, or one's own
        batch = recorded[0].batch
        weights = (batch["log_target"] - batch["log_proposal"]).view(-1, num_generations_eval)
        bound = weights.logsumexp(dim=1, keepdim=True) + math.log(3 / 4 / num_generations_eval)
        others = weights.flip(1)
        if kind != "tb":  # whose log Z is a mean of log-ratios, which a lone success does not make infinite
            others = torch.maximum(others, bound)
        close(batch["log_z"], others.flatten() if num_generations_eval > 1 else weights[:, 0])


def test_evaluation_does_not_change_training(make: Make) -> None:
    # The state that training learns from (Z of each prompt, replay) is not touched by looking at the policy
    config = {"partition": "running", "replay_buffer_size": 2 * G, "max_steps": 3}
    looked, not_looked = make("dpg", config, eval_dataset=plain()), make("dpg", config)
    for trainer in (looked, not_looked):
        script(trainer, SCORED * 2)
    looked.evaluate()
    state = looked.posterior_state()
    assert state["partition"]["running"]["keys"] == []
    assert state["replay_buffer"]["rows"] == []
    learn(looked)
    learn(not_looked)
    assert_same_weights(looked, not_looked)


def test_evaluation_batch_larger_than_the_generation_batch(kind: str, make: Make) -> None:
    # transformers' default for evaluation is 8, whatever the batch of training
    config = {"per_device_train_batch_size": G, "per_device_eval_batch_size": 4 * G, "log_completions": True}
    trainer = make(kind, config, eval_dataset=plain())
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    learn(trainer)


def test_several_evaluation_datasets(make: Make) -> None:
    datasets = {"one": plain(), "two": conversational()}
    config = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2 * G}
    for evaluation in (datasets, DatasetDict(datasets)):
        trainer = make("f_dpg", config, eval_dataset=evaluation)
        learn(trainer)
        logged = {name for log in trainer.state.log_history for name in log}
        assert {"eval_one_loss", "eval_two_loss", "eval_posterior/ess"} <= logged


def test_streamed_evaluation(make: Make) -> None:
    trainer = make("kl_rl", {"per_device_eval_batch_size": G}, eval_dataset=plain().to_iterable_dataset())
    assert math.isfinite(trainer.evaluate()["eval_posterior/reverse_kl"])


def test_best_model_by_one_of_our_metrics(make: Make) -> None:
    config = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": G,
        "save_strategy": "best",
        "metric_for_best_model": "eval_posterior/reverse_kl",
        "greater_is_better": False,
        "load_best_model_at_end": True,
    }
    trainer = make("kl_rl", config, eval_dataset=plain())
    trainer.train()
    logged = [log["eval_posterior/reverse_kl"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.state.best_metric == min(logged)
