"""What data and rewards a trainer refuses when it is made, in Python as on the command line."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig

from tests.helpers.architectures import build_model
from tests.helpers.trainers import QUIET
from trl_bayes import KLRLConfig, KLRLTrainer


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


def make(folder: Path, prompts: list[Any], architecture: str = "llama", rewards: Any = reward, **settings: Any) -> Any:
    path = build_model(folder / "model", architecture)
    args = KLRLConfig(**{**QUIET, "output_dir": str(folder), "max_completion_length": 4, **settings})
    return KLRLTrainer(path, rewards, args, Dataset.from_dict({"prompt": prompts}))


def test_two_rewards_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Two rewards are called 'reward', .* by `called`"):
        make(tmp_path, ["a"], rewards=[reward, reward])


@pytest.mark.parametrize("cell", [None, ""])
def test_a_blank_prompt(cell: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A prompt of the data is missing|has no tokens"):
        make(tmp_path, ["a", cell])


def test_messages_without_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        make(tmp_path, [[{"role": "user", "content": "a"}]])


def test_a_completion_beyond_the_positions_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit into the model's 128 positions: lower `max_completion_length`"):
        make(tmp_path, [" ".join("abcdef" * 10)], "gpt2", max_completion_length=100)


def test_fewer_prompts_than_one_generation_takes(tmp_path: Path) -> None:
    """TRL leaves out what is no whole generation: it would train 0 steps and save the prior."""
    trainer = make(tmp_path, ["a", "b"], per_device_train_batch_size=6, num_generations=2)
    with pytest.raises(ValueError, match="has 2 prompts, and one generation takes 3 .* has at most 4 completions"):
        trainer.train()
    assert not any(tmp_path.glob("checkpoint-*"))


def splits() -> Any:
    return DatasetDict(train=Dataset.from_dict({"prompt": ["a", "b"]}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (splits, r"The data has the splits \['train'\]: give one of them"),
        (lambda: Dataset.from_dict({"prompt": ["a"], "completions": ["b"]}), "has a column 'completions', which is"),
    ],
)
def test_data_of_another_form(data: Any, message: str, tmp_path: Path) -> None:
    args = KLRLConfig(**QUIET, output_dir=str(tmp_path), max_completion_length=4)
    with pytest.raises(ValueError, match=message):
        KLRLTrainer(build_model(tmp_path / "model", "llama"), reward, args, data())


def test_an_evaluation_that_breaks_groups(tmp_path: Path) -> None:
    trainer = make(tmp_path, ["a", "b"], num_generations=16, per_device_train_batch_size=16)
    with pytest.raises(ValueError, match="takes 8 completions at a time .* no whole groups of 16"):
        trainer.evaluate(Dataset.from_dict({"prompt": ["a", "b"]}))


def test_weights_that_trl_would_cast(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="casts the float32 weights that are trained to half precision"):
        make(tmp_path, ["a"], use_transformers_continuous_batching=True, bf16=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_decay_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="`weight_decay=0.1` pulls weights"):
        trainer = make(tmp_path, ["a"], weight_decay=0.1)
    assert len(trainer.args.inexact) == 1


def test_dropout_of_an_adapter_that_has_not_been_trained(tmp_path: Path) -> None:
    """It drops nothing that can be seen before the first update, so the check of log-probabilities would pass."""
    path = build_model(tmp_path / "model", "llama")
    data = Dataset.from_dict({"prompt": ["a"]})
    adapter = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"])
    for disabled in (True, False):
        args = KLRLConfig(**QUIET, output_dir=str(tmp_path), max_completion_length=4, disable_dropout=disabled)
        if disabled:
            KLRLTrainer(path, reward, args, data, peft_config=adapter)
        else:
            with pytest.raises(ValueError, match="`disable_dropout=False` leaves it on"):
                KLRLTrainer(path, reward, args, data, peft_config=adapter)
