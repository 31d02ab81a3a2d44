"""What trains is evaluated and sampled by the same recipe, with the same meaning: lengths, templates and rewards.

Each test trains for a step, evaluates and samples by one recipe, and compares what the commands saw.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin
from trl.chat_template_utils import add_response_schema

from tests.helpers.one_recipe import MODULE, Seen, recipe_in, rewards_of, sample_settings
from trl_bayes.evaluation.files import read_report


@pytest.fixture(scope="module")
def marking(tmp_path_factory: pytest.TempPathFactory, tiny_models: Any) -> str:
    """A chat model that often thinks aloud, with a tokenizer that parses it."""
    folder = tmp_path_factory.mktemp("marking")
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.policy)
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    with torch.no_grad():
        for token in ("<think>", "</think>"):
            model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(token), 0] = 1.7
    model.save_pretrained(folder)
    add_response_schema(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(tmp_path: Path, tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    with recipe_in(tmp_path, tiny_models.policy, monkeypatch) as made:
        yield made


# ---------------------------------------------------------------------------------------------------------------------
# Lengths, templates


def test_a_recipe_without_a_length_has_trainings_everywhere(recipe: dict[str, Any]) -> None:
    """TRL's 512."""
    del recipe["max_completion_length"]
    seen = Seen(recipe | {"reward_funcs": [f"{MODULE}.tokens"]})
    seen.train()
    args = torch.load("trained/training_args.bin", weights_only=False)
    seen.evaluate("trained", "--num_samples", "2", "--num_reference_samples", "2", "--max_prompts", "1")
    seen.sample("--num_samples", "2", "--max_prompts", "1")
    assert args.max_completion_length == 512
    assert read_report("runs/evaluation").problem["longest completion"] == "512 tokens"
    assert sample_settings()["max_completion_length"] == 512


def test_rewards_are_given_parsed_messages(recipe: dict[str, Any], marking: str) -> None:
    """By a tokenizer with a response template: reasoning stands beside the content."""
    recipe |= {"model_name_or_path": marking, "prompt_as_message": True, "reward_funcs": [f"{MODULE}.has_mark"]}
    seen = Seen(recipe)
    keys = seen.train()["keys"]
    assert "reasoning_content" in keys or "thinking" in keys
    assert seen.logged()["rewards/has_mark/mean"] == 0
    assert set(seen.evaluate()["keys"]) == set(keys) and rewards_of("prior") == rewards_of("trained") == 0
    assert set(seen.sample()["keys"]) == set(keys)
    drawn = load_dataset("runs/sample", split="train")
    assert any("<think>" in row["completion"][0]["content"] for row in drawn)  # the texts themselves have marks


def test_arguments_of_the_chat_template(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's template writes an empty thought where it must not think: all commands continue the same tokens."""
    continued: dict[str, set[tuple[int, ...]]] = {}
    original = GenerationMixin.generate
    running = [""]

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = zip(kwargs["input_ids"], kwargs["attention_mask"].bool(), strict=True)
        continued.setdefault(running[0], set()).update(tuple(ids[own].tolist()) for ids, own in pairs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    tokenizer = AutoTokenizer.from_pretrained(recipe["model_name_or_path"])
    messages = [[{"role": "user", "content": text}] for text in ("Say a", "Say b")]
    prompts = {
        think: {
            tuple(ids)
            for ids in tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=think)[
                "input_ids"
            ]
        }
        for think in (True, False)
    }
    for think in (True, False):
        for name in ("trained", "runs"):
            shutil.rmtree(name, ignore_errors=True)
        seen = Seen(recipe | {"prompt_as_message": True, "chat_template_kwargs": {"enable_thinking": think}})
        for running[0], run in (("train", seen.train), ("evaluate", seen.evaluate), ("sample", seen.sample)):
            continued.clear()
            run()
            assert prompts[think] <= continued[running[0]] and not prompts[not think] & continued[running[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        ("partial", "scaled"),
        ("instance", "Callable"),
        ("async_instance", "AsyncCallable"),
        ("Callable", "Callable"),  # a class, which is its own factory
        ("with_all", "with_all"),
        ("with_columns", "with_columns"),
    ],
)
def test_rewards_of_every_kind(reward: str, name: str, recipe: dict[str, Any]) -> None:
    """They have the name that TRL logs, and what a target reads by that name is there."""
    target = {"name": "tilt", "beta": 1.0, "rewards": [name]}
    data = {"dataset_name": "columns.jsonl"} if name == "with_columns" else {}
    seen = Seen(recipe | {"reward_funcs": [f"{MODULE}.{reward}"], "target": target} | data)
    columns = seen.train().get("columns")
    assert f"rewards/{name}/mean" in seen.logged()
    assert seen.evaluate().get("columns") == columns
    assert read_report("runs/evaluation").problem["rewards"] == name
    assert seen.sample().get("columns") == columns
    assert sample_settings()["rewards"] == [name]


@pytest.mark.parametrize("remove_unused_columns", [False, True])
def test_columns_are_those_that_training_hands_on(remove_unused_columns: bool, recipe: dict[str, Any]) -> None:
    recipe |= {"reward_funcs": [f"{MODULE}.prompts_seen"], "remove_unused_columns": remove_unused_columns}
    seen = Seen(recipe | {"target": "tilt"})
    others = seen.train()["others"]
    assert ("number" in others) == (not remove_unused_columns) and "trainer_state" in others
    assert seen.evaluate()["others"] == seen.sample()["others"] == others


@pytest.mark.parametrize("command", ["kl-rl", "evaluate", "sample"])
@pytest.mark.parametrize(
    "rewards",
    [
        [{"name": "length_between", "maximum": 3}, {"name": "length_between", "maximum": 8}],
        [f"{MODULE}.instance", f"{MODULE}.Callable"],
        ["some/reward", "other/reward"],
    ],
    ids=["factory", "callables", "models"],
)
def test_two_rewards_of_one_name_are_refused(
    command: str, rewards: list[Any], recipe: dict[str, Any], refusal: Callable[..., str]
) -> None:
    flags = {"evaluate": {"policies": [recipe["model_name_or_path"]]}, "sample": {"method": "prior"}}.get(command, {})
    message = refusal(command, recipe | flags | {"reward_funcs": rewards})
    assert message.startswith("Two rewards are called '") and "`called`" in message


def test_two_rewards_told_apart_by_called(recipe: dict[str, Any]) -> None:
    rewards = [{"name": "length_between", "maximum": n, "called": f"to_{n}", "unit": "tokens"} for n in (3, 5)]
    seen = Seen(recipe | {"reward_funcs": rewards})
    seen.train()
    seen.evaluate()
    assert {"rewards/to_3/mean", "rewards/to_5/mean"} <= seen.logged().keys()
    assert read_report("runs/evaluation").problem["rewards"] == "to_3, to_5"
