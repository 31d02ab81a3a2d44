"""Is the prior what the user takes it for? It must not move, and must be the model that training starts from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.helpers.architectures import build_model
from tests.helpers.trainers import QUIET, TRAINERS
from tests.helpers.training import lora
from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.prior.trained_on import draws_trained_on
from trl_bayes.trainers.further_data import rows_of
from trl_bayes.trainers.learning_from_prior import prior_samples_of


TASK = letter_count_task()
Make = Callable[..., Any]


@pytest.fixture
def make(letters_prior: str, tmp_path: Path) -> Make:
    def build(kind: str = "kl_rl", config: dict[str, Any] | None = None, **arguments: Any) -> Any:
        row = TRAINERS[kind]
        defaults = {
            **QUIET,
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_completion_length": TASK.max_completion_length,
            "learning_rate": 1e-2,
            "num_prior_samples": 20,
        }
        given = {"model": letters_prior, "reward_funcs": TASK.reward_func, "train_dataset": TASK.dataset(16)}
        return row.trainer(args=row.config(**{**defaults, **(config or {})}), **{**given, **arguments})

    return build


def saved(folder: Path, base: str, adapter_name: str = "default") -> str:
    """An adapter that changes a model by a few nats."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(), adapter_name=adapter_name)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    return str(folder)


def test_a_model_that_was_merged_in_memory_is_no_start(make: Make, letters_prior: str, tmp_path: Path) -> None:
    """TRL takes the prior from the folder that the model came from, where the adapter is not merged."""

    def merged() -> Any:
        base = AutoModelForCausalLM.from_pretrained(letters_prior)
        return PeftModel.from_pretrained(base, saved(tmp_path / "adapter", letters_prior)).merge_and_unload()

    model = merged()
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="nats per token from the prior, which is what the model was loaded"):
        make(model=model).train()
    model = merged()
    model.save_pretrained(tmp_path / "merged")
    make(model=str(tmp_path / "merged"), processing_class=make().processing_class).train()


@pytest.mark.parametrize("kind", ["kl_rl", "dpg", "xpo"])
def test_an_adapter_whose_beginning_changes_the_model_is_no_start(kind: str, make: Make) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="olora")
    with pytest.raises(ValueError, match="nats per token from the prior"):
        make(kind, {"learning_rate": 1e-3}, peft_config=config).train()


def test_a_trained_adapter_is_its_own_prior(make: Make, letters_prior: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(letters_prior)
    adapter = saved(tmp_path / "adapter", letters_prior)
    make(model=PeftModel.from_pretrained(base, adapter, is_trainable=True)).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, "are no part of the adapter, so the prior, .* would move .*: set `bias='none'`"),
        ({"bias": "lora_only"}, "are no part of the adapter"),
    ],
)
def test_biases_that_prior_and_policy_share(
    settings: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, **settings)
    with pytest.raises(ValueError, match=message):
        make(model=build_model(tmp_path / "gpt2", "gpt2"), peft_config=config)


def test_whole_modules_are_part_of_an_adapter(make: Make) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = make(peft_config=config)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["posterior/kl_prior"] == pytest.approx(0.0, abs=1e-6)


def test_an_adapter_that_is_loaded_for_inference(make: Make, letters_prior: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(letters_prior)
    model = PeftModel.from_pretrained(base, saved(tmp_path / "adapter", letters_prior))
    with pytest.raises(ValueError, match="No weight of the model's adapter can be trained: .*is_trainable=True"):
        make(model=model)


def test_an_adapter_of_another_name(make: Make, letters_prior: str) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(letters_prior), lora(), adapter_name="mine")
    with pytest.raises(ValueError, match="adapter is called 'mine', and TRL trains the one called 'default'"):
        make(model=model)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_a_checkpoint_is_no_prior(make: Make, tmp_path: Path) -> None:
    make().train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    make().train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="whose prior has other weights than this one's"):
        make(model=checkpoint).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("kind", ["kl_rl", "dpg", "xpo"])
@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"temperature": 0.7}, {}, "`temperature=1.0`, this one has 0.7"),
        ({"max_completion_length": 3}, {}, "`max_completion_length=4`, this one has 3"),
        ({"reward_weights": [5.0]}, {}, "`rewards={.*: 1.0}`, this one has {.*: 5.0}"),
        ({}, {"reward_funcs": lambda completions, **kwargs: [0.5] * len(completions)}, "this one has {'<lambda>'"),
    ],
)
def test_what_was_learned_of_other_evidence_is_not_resumed(
    kind: str, config: dict[str, Any], arguments: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    make(kind).train()
    with pytest.raises(ValueError, match=message):
        make(kind, config, **arguments).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


# ---------------------------------------------------------------------------------------------------------------------
# Kept samples on which a policy was trained


@pytest.mark.parametrize(
    ("kind", "config", "is_trained_on"),
    [
        ("dpg", {"partition": "prior_samples"}, False),
        ("dpg", {"prior_fraction": 0.25}, True),
        ("xpo", {}, True),
    ],
)
def test_samples_that_join_the_batches_are_marked(
    kind: str, config: dict[str, Any], is_trained_on: bool, make: Make, tmp_path: Path
) -> None:
    """Beside the policy and beside the samples, once it is trained on them."""
    trainer = make(kind, config, eval_dataset=TASK.dataset(8))
    trainer.evaluate()
    samples = prior_samples_of(trainer, rows_of(trainer))
    draw = samples.identity.fingerprint
    assert not draws_trained_on(samples.folder) and not draws_trained_on(tmp_path / "out")
    trainer.train()
    for folder in (samples.folder, tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        assert draws_trained_on(folder) == ({draw} if is_trained_on else set())
