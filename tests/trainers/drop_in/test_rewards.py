"""Reward functions: several, async, models; missing, infinite and steep rewards; what TRL hands to them and shows."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.helpers.training import assert_same_weights, length_reward, parameters, step_logs
from tests.trainers.drop_in.runs import (
    BETA,
    OF_Z,
    PROMPTS,
    SCORED,
    SGD,
    G,
    Make,
    assert_unchanged,
    close,
    completions,
    conversational,
    learn,
    length_evidence,
    plain,
    record,
    script,
)


def early_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids) < 8) for ids in completion_ids]


async def async_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(set(ids))) / 8 for ids in completion_ids]


def test_several_weighted_reward_functions(kind: str, make: Make) -> None:
    trainer = make(kind, {"reward_weights": [0.7, 0.3]}, reward_funcs=[length_reward, early_reward])
    recorded = record(trainer)
    logs = learn(trainer)
    lengths = recorded[0].batch["completion_mask"].sum(dim=1)
    reward = 0.7 * lengths / 4 + 0.3 * (lengths < 8)
    close(recorded[0].batch["log_target"] - recorded[0].log_policy, reward / BETA)  # the policy starts at the prior
    assert logs[0]["reward"] == pytest.approx(reward.mean().item(), abs=1e-5)
    for name in ("length_reward", "early_reward"):
        assert f"rewards/{name}/mean" in logs[0]
        assert f"rewards/{name}/std" in logs[0]


def test_sync_async_and_model_rewards_together(kind: str, make: Make, tiny_models: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_models.reward, tmp_path / "classifier")
    classifier = AutoModelForSequenceClassification.from_pretrained(copy, num_labels=1)
    weights = parameters(classifier)
    trainer = make(kind, reward_funcs=[length_reward, async_reward, classifier, tiny_models.reward])
    recorded = record(trainer)
    logs = learn(trainer)
    assert [name for name in logs[0] if name.startswith("rewards/") and name.endswith("/mean")] == [
        "rewards/length_reward/mean",
        "rewards/async_reward/mean",
        "rewards/classifier/mean",
        "rewards/reward/mean",
    ]
    # The model is there twice, as an object of another name and as a path
    batch, log_policy, _ = recorded[0]
    functions = length_evidence(batch) * BETA + torch.tensor([len(set(ids)) / 8 for ids in completions(batch)])
    twice = (batch["log_target"] - log_policy) * BETA - functions
    assert twice.mean().item() == pytest.approx(2 * logs[0]["rewards/reward/mean"], abs=1e-4)
    assert twice.std().item() > 0
    assert all(torch.equal(weights[name], parameter) for name, parameter in classifier.named_parameters())


def test_reward_model_with_its_own_tokenizer(make: Make, tiny_models: Any) -> None:
    # Conversational prompts are rendered with the reward model's chat template
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.reward)
    trainer = make(
        "f_dpg",
        reward_funcs=tiny_models.reward,
        reward_processing_classes=tokenizer,
        train_dataset=conversational(),
    )
    learn(trainer)
    assert trainer.reward_processing_classes == [tokenizer]


def test_reward_function_that_does_not_apply_to_some_completions(kind: str, make: Make) -> None:
    def every_other(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [None if i % 2 else 1.0 for i in range(len(completion_ids))]

    trainer = make(kind, {"reward_weights": [1.0, 2.0]}, reward_funcs=[length_reward, every_other])
    recorded = record(trainer)
    logs = learn(trainer)
    batch, log_policy, _ = recorded[0]
    extra = torch.tensor([2.0 / BETA, 0.0]).repeat(G)  # what does not apply adds nothing
    close(batch["log_target"] - log_policy, length_evidence(batch) + extra)
    assert batch["usable"].all()
    assert logs[0]["posterior/frac_unscored"] == 0


def test_reward_function_that_never_applies(make: Make) -> None:
    def never(completions: list, **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    with_it, without_it = make("kl_rl", reward_funcs=[length_reward, never]), make("kl_rl")
    logs = learn(with_it)
    learn(without_it)
    assert logs[0]["rewards/never/mean"] is None  # not NaN, which a JSON logger could not write
    assert_same_weights(with_it, without_it)


def first_of_each_group(value: float | None) -> Callable[..., list[float | None]]:
    """`length_reward`, but the first completion of every group gets `value`."""

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [value if i % G == 0 else len(ids) / 4 for i, ids in enumerate(completion_ids)]

    return reward


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_completion_without_a_usable_reward_is_left_out(value: float | None, kind: str, make: Make) -> None:
    trainer = make(kind, reward_funcs=first_of_each_group(value))
    recorded = record(trainer)
    for log in learn(trainer):
        assert log["posterior/frac_unscored"] == 1 / G
        is_infinite = value is not None and math.isinf(value)
        assert log["posterior/frac_infinite_reward"] == (1 / G if is_infinite else 0)
    for batch, _, _ in recorded:
        first = torch.arange(2 * G) % G == 0
        assert torch.equal(batch["usable"], ~first)
        assert (batch["advantages"][first] == 0).all()
        assert (batch["advantages"][~first] != 0).any()
        assert batch["log_z"].isfinite().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_completion_with_an_infinite_reward_is_left_out(value: float, make: Make) -> None:
    """What one function forbids is not judged by what the others say of it."""

    def forbids(completions: list, **kwargs: Any) -> list[float]:
        return [value if i % 3 == 0 else 0.0 for i in range(len(completions))]

    def says_nothing(completion_ids: list, **kwargs: Any) -> list[float | None]:
        rewards = length_reward(completion_ids=completion_ids, **kwargs)
        return [None if i % 3 == 0 else reward for i, reward in enumerate(rewards)]

    with_it, without_it = make("dpg", reward_funcs=[length_reward, forbids]), make("dpg", reward_funcs=says_nothing)
    logs, expected = learn(with_it), learn(without_it)
    assert logs[0]["posterior/frac_infinite_reward"] == pytest.approx(1 / 3, abs=0.1)
    assert logs[0]["posterior/frac_unscored"] == expected[0]["posterior/frac_unscored"] > 0
    assert_same_weights(with_it, without_it)


UNSCORED = [[[300, 301, 2]] * G, [[302, 2]] * G]


@pytest.mark.parametrize("value", [None, math.inf])
def test_group_without_any_reward_changes_nothing(value: float | None, kind: str, make: Make) -> None:
    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [len(ids) / 4 if i < G else value for i, ids in enumerate(completion_ids)]

    runs = [make(kind, SGD, reward_funcs=reward) for _ in UNSCORED]
    for run, unscored in zip(runs, UNSCORED, strict=True):
        script(run, SCORED + unscored)
        logs = learn(run)
        assert logs[0]["posterior/frac_unscored"] == 0.5
    assert_same_weights(*runs, atol=1e-6)  # whatever was in the group


@pytest.mark.parametrize("value", [None, -math.inf])
def test_no_reward_at_all_is_no_update(value: float | None, kind: str, make: Make) -> None:
    trainer = make(kind, reward_funcs=lambda completions, **kwargs: [value] * len(completions))
    before = parameters(trainer.model, trainable=False)
    trainer.train()
    assert_unchanged(trainer, before)
    for log in step_logs(trainer):
        assert log["grad_norm"] == 0
        assert log["loss"] == 0
        assert log["posterior/frac_unscored"] == 1
        assert not log.keys() & set(OF_Z)  # unknown, and not NaN


def test_steep_rewards_do_not_poison_the_weights(kind: str, make: Make) -> None:
    # GRPO divides by the standard deviation, so its users have rewards of any size. Here siblings are some 300 nats
    # apart, far beyond what exp() of a float32 holds.
    def steep(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [20.0 * len(ids) for ids in completion_ids]

    trainer = make(kind, reward_funcs=steep)
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    for log in step_logs(trainer):
        assert math.isfinite(log["loss"])
        assert not math.isnan(log["grad_norm"])


def test_policy_that_moves_far_does_not_poison_the_weights(kind: str, make: Make) -> None:
    # Several passes over long completions with a large step: pi/q of a sequence exceeds what a float32 holds
    config = {"num_iterations": 4, "max_steps": 8, "learning_rate": 0.3, "max_completion_length": 64}
    trainer = make(
        kind, config, reward_funcs=lambda completion_ids, **kwargs: [ids[0] / 100 for ids in completion_ids]
    )
    script(trainer, [[65 + i] * 64 for i in range(G)] * 2)
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    for log in step_logs(trainer):
        assert math.isfinite(log["loss"])
        assert not math.isnan(log["grad_norm"])


def test_dataset_columns_reach_the_reward(make: Make) -> None:
    answers = dict(zip(PROMPTS, "abcd", strict=True))

    def answer_reward(prompts: list[str], completion_ids: list, answer: list[str], **kwargs: Any) -> list[float]:
        assert [answers[prompt] for prompt in prompts] == answer
        return [len(ids) / 4 + (letter == "a") for ids, letter in zip(completion_ids, answer, strict=True)]

    learn(make("dpg", reward_funcs=answer_reward, train_dataset=plain(answer=list("abcd"))))


def test_what_trl_offers_a_reward_function(make: Make, tmp_path: Path) -> None:
    steps = []

    def reward(
        completion_ids: list, trainer_state: Any, log_extra: Callable, log_metric: Callable, **kwargs: Any
    ) -> list[float]:
        steps.append(trainer_state.global_step)
        lengths = [len(ids) for ids in completion_ids]
        log_extra("length", lengths)
        log_metric("longest", max(lengths))
        return [length / 4 for length in lengths]

    logs = learn(make("tb", {"log_completions": True}, reward_funcs=reward))
    assert steps == [0, 1]
    assert all(log["longest"] == log["completions/max_length"] for log in logs)
    table = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    assert table["length"].tolist() == [4 * value for value in table["reward"]]


def test_completions_table_shows_our_advantages(kind: str, make: Make, tmp_path: Path) -> None:
    # Two generations fill the log of completions one after the other; the table is that of the latest
    trainer = make(kind, {"log_completions": True})
    recorded = record(trainer)
    learn(trainer)
    for step, (batch, _, rows) in enumerate(recorded, start=1):
        table = pd.read_parquet(tmp_path / "out" / "completions" / f"completions_{step:05d}.parquet")
        assert table["prompt"].tolist() == [row["prompt"] for row in rows]
        assert table["advantage"].tolist() == pytest.approx(batch["advantages"].tolist())
        close(torch.tensor(table["length_reward"].tolist()), length_evidence(batch) * BETA)
