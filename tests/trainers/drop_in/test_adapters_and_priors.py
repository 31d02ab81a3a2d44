"""Adapters, new and trained before, and a prior of its own: which model the prior is."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
)

from tests.helpers.training import parameters
from tests.trainers.drop_in.runs import (
    BETA,
    Make,
    close,
    dropping_lora,
    learn,
    length_evidence,
    record,
    sequence_log_probs,
    trained_adapter,
    with_adapter,
)


def test_new_adapter(kind: str, make: Make, tiny_models: Any) -> None:
    trainer = make(kind, {"max_steps": 3, "gradient_checkpointing": True}, peft_config=dropping_lora())
    base = {name: p for name, p in parameters(trainer.model, trainable=False).items() if "lora" not in name}
    recorded = record(trainer)
    learn(trainer)
    assert isinstance(trainer.model, PeftModel)
    assert trainer.ref_model is None  # the prior is the model without its adapter
    for name, parameter in base.items():
        assert torch.equal(trainer.model.get_parameter(name), parameter), f"{name} has changed"
    prior = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    for batch, log_policy, _ in recorded:
        close(batch["log_proposal"], log_policy)  # with the adapter, and without its dropout
        close(batch["log_target"] - length_evidence(batch), sequence_log_probs(prior, batch))
    assert not torch.allclose(recorded[-1].log_policy, sequence_log_probs(prior, recorded[-1].batch), atol=1e-3)


def test_adapter_that_was_trained_before(kind: str, make: Make, tiny_models: Any) -> None:
    # The prior is the adapter that training starts from, not the model underneath
    trainer = make(kind, model=trained_adapter(tiny_models.policy))
    assert not any(".ref." in name for name in parameters(trainer.model))
    recorded = record(trainer)
    learn(trainer)
    prior = trained_adapter(tiny_models.policy).eval()
    for batch, log_policy, _ in recorded:
        close(batch["log_proposal"], log_policy)
        close(batch["log_target"] - length_evidence(batch), sequence_log_probs(prior, batch))
    base = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    start = sequence_log_probs(base, recorded[0].batch)
    assert not torch.allclose(start, recorded[0].log_policy, atol=1e-3)


@pytest.mark.parametrize("adapter", ["none", "new", "trained"])
def test_prior_of_its_own(adapter: str, kind: str, make: Make, tiny_models: Any) -> None:
    trainer = make(
        kind,
        {"prior_model_name_or_path": tiny_models.prior, "max_steps": 3},
        **with_adapter(adapter, tiny_models.policy),
    )
    assert trainer.args.beta == trainer.beta == BETA
    weights = parameters(trainer.ref_model, trainable=False)
    recorded = record(trainer)
    logs = learn(trainer)
    prior = AutoModelForCausalLM.from_pretrained(tiny_models.prior)
    for batch, _, _ in recorded:
        close(batch["log_target"] - length_evidence(batch), sequence_log_probs(prior, batch))
    assert logs[0]["posterior/kl_prior"] != 0  # training does not start from the prior
    assert all(torch.equal(weights[name], p) for name, p in trainer.ref_model.named_parameters())


def test_prior_with_another_vocabulary_is_refused(make: Make, tiny_models: Any) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        make("f_dpg", {"prior_model_name_or_path": tiny_models.other_vocabulary})


def test_prior_follows_the_settings_of_the_models(make: Make, tiny_models: Any) -> None:
    config = {"prior_model_name_or_path": tiny_models.prior, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = make("f_dpg", {**config, "cast_lm_head_to_fp32": True, "temperature": 0.7})
    assert trainer.model.model.dtype == trainer.ref_model.model.dtype == torch.bfloat16
    recorded = record(trainer)
    learn(trainer)
    prior = AutoModelForCausalLM.from_pretrained(tiny_models.prior, dtype="float32")
    expected = sequence_log_probs(prior, recorded[0].batch, temperature=0.7)
    difference = recorded[0].batch["log_target"] - length_evidence(recorded[0].batch) - expected
    assert difference.abs().max() < 0.3  # bfloat16: eight tokens
