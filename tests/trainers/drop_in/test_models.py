"""Models: as a path or an object, mixture of experts, bfloat16, checkpointing, tokenizers, optimizers."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
)

from tests.helpers.training import assert_same_weights
from tests.trainers.drop_in.runs import (
    GENERATION_METRICS,
    METRICS,
    SGD,
    G,
    Make,
    close,
    completions,
    learn,
    length_evidence,
    record,
)


def test_model_as_path_or_as_object(kind: str, make: Make, tiny_models: Any) -> None:
    by_path = make(kind)
    by_object = make(kind, model=AutoModelForCausalLM.from_pretrained(tiny_models.policy, dtype="float32"))
    learn(by_path)
    learn(by_object)
    assert_same_weights(by_path, by_object)


@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_mixture_of_experts(coefficient: float | None, kind: str, make: Make, tiny_models: Any) -> None:
    # The load-balancing loss of the architecture is added, with its own coefficient unless the config has one
    config = {"router_aux_loss_coef": coefficient, "gradient_accumulation_steps": 2, "per_device_train_batch_size": G}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make(kind, config, model=tiny_models.moe)
    told = [each for each in caught if "The router's loss" in str(each.message)]
    assert len(told) == len(trainer.args.inexact) == (1 if coefficient is None else 0)
    added: list[float] = []
    compute_loss = trainer._compute_loss

    def compute_and_compare(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        loss = compute_loss(model, inputs)
        trainer.aux_loss_enabled, enabled = False, trainer.aux_loss_enabled
        with torch.no_grad():
            added.append((loss - compute_loss(model, inputs)).item())
        trainer.aux_loss_enabled = enabled
        return loss

    trainer._compute_loss = compute_and_compare
    for step, log in enumerate(learn(trainer)):
        if coefficient is None:
            assert log["aux_loss"] > 0
            assert sum(added[2 * step : 2 * step + 2]) == pytest.approx(0.1 * log["aux_loss"], rel=1e-3)
        else:
            assert "aux_loss" not in log
            assert sum(added) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bf16(dtype: str, kind: str, make: Make) -> None:
    trainer = make(kind, {"bf16": True, "model_init_kwargs": {"dtype": dtype}})
    recorded = record(trainer)
    learn(trainer)
    assert recorded[0].batch["log_target"].dtype == torch.float32  # sums over tokens are not in bfloat16
    close(recorded[0].batch["log_target"] - length_evidence(recorded[0].batch), recorded[0].batch["log_proposal"])


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_gives_the_same_gradient(options: dict[str, bool], make: Make) -> None:
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options}
    with_it, without_it = make("f_dpg", {**SGD, **checkpointing}), make("f_dpg", SGD)
    learn(with_it)
    learn(without_it)
    assert_same_weights(with_it, without_it, atol=1e-6)


def test_tokenizer_without_a_padding_token(make: Make, tiny_models: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.policy, pad_token=None)
    assert tokenizer.pad_token is None
    trainer = make(
        "dpg", processing_class=tokenizer
    )  # TRL pads with EOS, which must not end the completions in the loss
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    recorded = record(trainer)
    learn(trainer)
    batch, log_policy, _ = recorded[0]
    close(batch["log_proposal"], log_policy)
    ended = (batch["completion_ids"] == tokenizer.eos_token_id) & batch["completion_mask"].bool()
    assert ended.any(dim=1).any()  # EOS itself is scored


def test_several_end_tokens_and_added_tokens(make: Make, tiny_models: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.policy)
    tokenizer.add_tokens(["<answer>"])
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ends = [tokenizer.eos_token_id, *range(60, 90)]
    model.generation_config.eos_token_id = ends
    folder = tmp_path / "resized"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = make("f_dpg", model=str(folder))
    recorded = record(trainer)
    learn(trainer)
    batch, log_policy, _ = recorded[0]
    close(batch["log_proposal"], log_policy)
    assert {ids[-1] for ids in completions(batch)} & set(ends[1:])


def test_own_callbacks_and_optimizer(make: Make) -> None:
    seen: list[str] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            seen.extend(logs)

    trainer = make("kl_rl", callbacks=[Watch()])
    sgd = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)
    trainer = make("kl_rl", model=trainer.model, callbacks=[Watch()], optimizers=(sgd, schedule))
    assert trainer.optimizer is sgd
    learn(trainer)
    assert {*METRICS, *GENERATION_METRICS} <= set(seen)
