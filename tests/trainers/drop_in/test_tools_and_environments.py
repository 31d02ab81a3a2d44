"""Tools and environments: what they say is neither scored nor trained on, and their rewards count."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedTokenizerBase,
)
from trl import GRPOTrainer

from tests.trainers.drop_in.runs import (
    BETA,
    G,
    Make,
    close,
    conversational,
    learn,
    length_evidence,
    record,
    sequence_log_probs,
)


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.
    """
    return a * b


async def multiply_later(a: int, b: int) -> int:
    """
    Multiplies two integers, in its own time.

    Args:
        a: The first integer.
        b: The second integer.
    """
    return a * b


class Counter:
    """An environment that owns its reward: the model is to add numbers up."""

    def reset(self, **kwargs: Any) -> str:
        self.total = 0
        return " The total is 0."

    def add(self, amount: int) -> int:
        """
        Adds to the total.

        Args:
            amount: What to add.
        """
        self.total += amount
        return self.total

    def get_reward(self) -> float:
        return self.total / 4


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call><|im_end|>'


def speak(trainer: GRPOTrainer, tokenizer: PreTrainedTokenizerBase, first_turns: list[str]) -> None:
    """Lets the model 'say' `first_turns`, in this order, and 'Done!' after each tool result."""

    def generate(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        turns = iter(first_turns * len(input_ids))
        said = [
            "Done!<|im_end|>" if "<tool_response>" in tokenizer.decode(prompt) else next(turns) for prompt in input_ids
        ]
        answers = tokenizer(said, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, answers], dim=1)

    trainer.model.generate = generate


@pytest.mark.parametrize("tool", [multiply, multiply_later])
@pytest.mark.parametrize(
    ("kind", "config"),
    [("kl_rl", {}), ("f_dpg", {}), ("tb", {}), ("dpg", {"replay_buffer_size": 8})],
)
def test_tools(
    kind: str, config: dict[str, Any], tool: Callable, make: Make, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = make(kind, {"max_completion_length": 256, **config}, train_dataset=conversational(), tools=[tool])
    name = tool.__name__
    turns = [call(name, '{"a": 3, "b": 4}'), call(name, '{"a": 3, "c": 4}'), "I know.<|im_end|>", "No idea<|im_end|>"]
    speak(trainer, chat_tokenizer, turns)
    recorded = record(trainer)
    for log in learn(trainer):
        assert log["tools/call_frequency"] == 0.5
        assert log["tools/failure_frequency"] == 0.5  # one of the two calls has a wrong argument
    batch, log_policy, _ = recorded[0]
    fresh = slice(0, 2 * G)
    pairs = zip(batch["completion_ids"], batch["tool_mask"], strict=True)
    results = [chat_tokenizer.decode(ids[mask == 0]) for ids, mask in pairs]
    assert "12" in results[0]
    assert "error" in results[1]
    assert results[2] == results[3] == ""
    # The policy neither chose nor is trained on what the tool said
    close(batch["log_proposal"][fresh], log_policy[fresh])
    unmasked = sequence_log_probs(trainer.ref_model, {k: v for k, v in batch.items() if k != "tool_mask"})
    assert (unmasked - log_policy)[0].abs() > 1
    # The prior is the policy that training starts from, tool results masked
    close((batch["log_target"] - log_policy)[fresh], length_evidence(batch)[fresh])


@pytest.mark.parametrize("with_dataset", [True, False])
def test_environment_that_owns_its_reward(
    with_dataset: bool,
    make: Make,
    chat_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = make(
        "f_dpg",
        {"max_completion_length": 256},
        reward_funcs=None,
        train_dataset=conversational() if with_dataset else None,
        environment_factory=Counter,
    )
    amounts = [1, 2, 3, 0]
    speak(trainer, chat_tokenizer, [call("add", f'{{"amount": {amount}}}') for amount in amounts])
    recorded = record(trainer)
    logs = learn(trainer)
    batch, log_policy, _ = recorded[0]
    rewards = torch.tensor(amounts * 2) / 4
    close(batch["log_target"] - log_policy, rewards / BETA)
    close(batch["log_proposal"], log_policy)
    assert logs[0]["rewards/Counter/mean"] == pytest.approx(rewards.mean().item())


def test_environment_reward_beside_a_function_can_be_read_by_name(
    make: Make, chat_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = make(
        "dpg",
        {"max_completion_length": 256, "target": {"name": "tilt", "beta": 1.0, "rewards": ["Counter"]}},
        train_dataset=conversational(),
        environment_factory=Counter,
    )
    speak(trainer, chat_tokenizer, [call("add", f'{{"amount": {amount}}}') for amount in (1, 2, 3, 0)])
    recorded = record(trainer)
    learn(trainer)
    close(recorded[0].batch["log_target"] - recorded[0].log_policy, torch.tensor([1.0, 2.0, 3.0, 0.0] * 2) / 4)


class Examiner(Counter):
    """An environment that writes its own prompts, another one at every generation."""

    num_resets = 0

    def reset(self, **kwargs: Any) -> str:
        self.num_resets += 1
        self.total = 0
        return f"Add up to {self.num_resets}."


def test_prompts_that_an_environment_writes_are_told_apart(
    make: Make, chat_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = make(
        "dpg",
        {"max_completion_length": 256, "max_steps": 3},
        reward_funcs=None,
        train_dataset=None,  # so every row of the data is the same
        environment_factory=Examiner,
    )
    speak(trainer, chat_tokenizer, [call("add", f'{{"amount": {amount}}}') for amount in (1, 2, 3, 0)])
    learn(trainer)
    past = trainer.partition.state_dict()
    assert past["count"] == [2 * G] * 3  # the two groups of each generation share a prompt


class Silent:
    """An environment without a reward of its own."""

    def reset(self, **kwargs: Any) -> None:
        return None

    def look(self) -> str:
        """Looks around."""
        return "Nothing."


def test_environments_by_name_with_a_reward_in_one_of_them(
    make: Make, chat_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = make(
        "dpg",
        {"max_completion_length": 256, "shuffle_dataset": False},
        reward_funcs=None,
        train_dataset=conversational(environment=["counter", "silent"] * 2),
        environment_factory={"counter": Counter, "silent": Silent},
    )
    turns = [call("add", f'{{"amount": {amount}}}') for amount in (1, 2, 3, 0)] + [call("look", "{}")] * G
    speak(trainer, chat_tokenizer, turns)
    recorded = record(trainer)
    for log in learn(trainer):
        assert log["posterior/frac_unscored"] == 0.5  # the group that no reward looks at is left out
    batch, log_policy, _ = recorded[0]
    assert batch["usable"].tolist() == [True] * G + [False] * G
    close((batch["log_target"] - log_policy)[:G], torch.tensor([1.0, 2.0, 3.0, 0.0]) / 4 / BETA)
