"""Checkpoints: a resumed run is the uninterrupted one, and what is saved is an ordinary model."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModelForCausalLM,
)

from tests.helpers.training import assert_same_weights, from_trl, step_logs
from tests.trainers.drop_in.runs import BETA, G, Make, dropping_lora, learn, plain


LEAVE_ONE_OUT = {"partition": "leave_one_out"}
RUNNING = {"partition": "running"}
REPLAY = {"replay_buffer_size": 3 * G, "replay_ratio": 0.5}
RESUMABLE = [
    ("kl_rl", LEAVE_ONE_OUT),
    ("f_dpg", RUNNING),
    ("dpg", {**LEAVE_ONE_OUT, "gradient_accumulation_steps": 2}),
    ("dpg", {**RUNNING, **REPLAY}),
    ("tb", LEAVE_ONE_OUT),
    ("tb", {**LEAVE_ONE_OUT, **REPLAY}),
]
# Two prompts a step, four in all, each twice in one epoch: at the checkpoint every prompt has been seen once, so what
# was learned about Z matters. (TRL's sampler starts its shuffles afresh when a run resumes in a later epoch.)
TWO_VISITS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "shuffle_dataset": False}


def twice() -> Dataset:
    return concatenate_datasets([plain(), plain()])


@pytest.mark.parametrize(("kind", "config"), RESUMABLE, ids=str)
def test_resumed_run_is_the_uninterrupted_one(kind: str, config: dict[str, Any], make: Make, tmp_path: Path) -> None:
    config = {**config, **TWO_VISITS}
    straight = make(kind, config, train_dataset=twice())
    learn(straight)
    resumed = make(kind, config, train_dataset=twice())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same_weights(straight, resumed)
    assert step_logs(straight)[-1]["loss"] == step_logs(resumed)[-1]["loss"]
    one, other = straight.posterior_state(), resumed.posterior_state()
    assert one.keys() == other.keys()
    assert one["partition"] == other["partition"]
    if "replay_buffer" in one:
        rows, other_rows = one["replay_buffer"]["rows"], other["replay_buffer"]["rows"]
        assert len(rows) == len(other_rows) == 3 * G
        for row, other_row in zip(rows, other_rows, strict=True):
            assert row.keys() == other_row.keys()
            assert all(torch.equal(row[name], other_row[name]) for name in row)


@from_trl
@pytest.mark.parametrize("config", [RUNNING, {**LEAVE_ONE_OUT, **REPLAY}], ids=str)
def test_resuming_needs_what_was_learned(config: dict[str, Any], make: Make, tmp_path: Path) -> None:
    # The converse: without our file the run goes on, says so, and is another one
    config = {**config, **TWO_VISITS}
    straight = make("dpg", config, train_dataset=twice())
    learn(straight)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    os.remove(checkpoint / "posterior_state_0.pt")
    resumed = make("dpg", config, train_dataset=twice())
    with pytest.warns(UserWarning, match="starts afresh"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(AssertionError):
        assert_same_weights(straight, resumed)


def test_checkpoint_of_another_trainer_or_target_is_refused(make: Make, tmp_path: Path) -> None:
    make("f_dpg", {"save_strategy": "steps", "save_steps": 1}).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(ValueError, match="FDPGTrainer"):
        make("dpg").train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="Tilt"):
        make("f_dpg", {"beta": 2 * BETA}).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(("before", "after"), [(LEAVE_ONE_OUT, RUNNING), ({"partition": "prior_samples"}, RUNNING)])
def test_replay_of_another_partition_is_refused(
    before: dict[str, Any], after: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    """What is kept has no prompt, or a prompt of which the new partition has seen nothing: log Z would be -inf."""
    few = {"num_prior_samples": 4, "save_strategy": "steps", "save_steps": 1}
    make("dpg", {**few, **REPLAY, **before}).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(ValueError, match=f"`partition='{before['partition']}'`.*`partition='running'` knows nothing"):
        make("dpg", {**few, **REPLAY, **after}).train(resume_from_checkpoint=checkpoint)
    make("dpg", {**few, **after}).train(resume_from_checkpoint=checkpoint)  # without replay it begins afresh


def test_checkpoint_of_an_earlier_version_is_refused(make: Make, tmp_path: Path) -> None:
    make("dpg", {"save_strategy": "steps", "save_steps": 1}).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    file = checkpoint / "posterior_state_0.pt"
    state = torch.load(file, weights_only=True)
    del state["partition"]  # earlier versions kept `log_z` and `num_updates` instead
    torch.save(state, file)
    with pytest.raises(ValueError, match="earlier version"):
        make("dpg").train(resume_from_checkpoint=str(checkpoint))


def test_checkpoint_of_an_adapter_resumes(make: Make, tmp_path: Path) -> None:
    straight = make("f_dpg", TWO_VISITS, peft_config=dropping_lora(), train_dataset=twice())
    learn(straight)
    resumed = make("f_dpg", TWO_VISITS, peft_config=dropping_lora(), train_dataset=twice())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same_weights(straight, resumed)


def test_saved_model_is_an_ordinary_one(kind: str, make: Make, tmp_path: Path) -> None:
    trainer = make(kind, {"save_strategy": "steps", "save_steps": 2, "save_only_model": True})
    learn(trainer)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert not list(checkpoint.glob("posterior_state*"))
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name))
    card = (tmp_path / "out" / "README.md").read_text()
    assert trainer._paper["id"] in card
    assert "GRPO" not in card
