"""Data sets: plain and conversational prompts, chat templates, streams, and how rows become batches."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
)

from tests.trainers.drop_in.runs import (
    PROMPTS,
    G,
    Make,
    close,
    conversational,
    learn,
    length_evidence,
    plain,
    record,
)


@pytest.mark.parametrize("dataset", [plain, conversational])
def test_plain_and_conversational_prompts(kind: str, dataset: Callable[[], Dataset], make: Make) -> None:
    # With TRL's default gradient checkpointing
    learn(make(kind, {"gradient_checkpointing": True}, train_dataset=dataset()))


def test_conversational_completions_reach_the_reward_as_messages(make: Make) -> None:
    def content_reward(prompts: list, completions: list, **kwargs: Any) -> list[float]:
        assert all(prompt[-1]["role"] == "user" for prompt in prompts)
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        return [len(completion[0]["content"]) / 16 for completion in completions]

    learn(make("f_dpg", reward_funcs=content_reward, train_dataset=conversational()))


def test_chat_template_arguments(make: Make, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = make("dpg", {"chat_template_kwargs": {"enable_thinking": False}}, train_dataset=conversational())
    recorded = record(trainer)
    learn(trainer)
    prompts = chat_tokenizer.batch_decode(recorded[0].batch["prompt_ids"])
    assert all(prompt.endswith("<think>\n\n</think>\n\n") for prompt in prompts)
    close(recorded[0].batch["log_proposal"], recorded[0].log_policy)


@pytest.mark.parametrize("partition", ["leave_one_out", "running"])
def test_streamed_dataset(partition: str, make: Make) -> None:
    stream = plain(answer=list("abcd")).to_iterable_dataset()
    trainer = make("dpg", {"partition": partition, "max_steps": 3}, train_dataset=stream)
    learn(trainer)
    if partition == "running":
        assert len(trainer.partition) == len(PROMPTS)  # three steps of two prompts: two of them came back


def test_num_generations_larger_than_the_batch(kind: str, make: Make) -> None:
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": 4}
    trainer = make(kind, config)
    recorded = record(trainer)
    learn(trainer)
    assert len(recorded[0].batch["usable"]) == 8  # one generation for the whole accumulation window
    close(recorded[0].batch["log_target"] - length_evidence(recorded[0].batch), recorded[0].log_policy)


def test_shuffle_dataset_off(make: Make) -> None:
    trainer = make("f_dpg", {"shuffle_dataset": False})
    recorded = record(trainer)
    learn(trainer)
    assert [row["prompt"] for row in recorded[0].rows] == [PROMPTS[0]] * G + [PROMPTS[1]] * G


def test_dataloader_workers(make: Make) -> None:
    learn(make("f_dpg", {"dataloader_num_workers": 2}))
