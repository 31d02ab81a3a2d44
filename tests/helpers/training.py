"""Watching a training run, and comparing two."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig


# `pytest.warns` re-issues what it did not expect under the test's name, where pyproject's filter does not look
from_trl = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def length_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A few nats between the shortest and the longest completion, for plain and conversational prompts alike."""
    return [len(ids) / 4 for ids in completion_ids]


def lora(**settings: Any) -> LoraConfig:
    """A small adapter, the identity until it is trained."""
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**defaults, **settings})


def parameters(model: torch.nn.Module, trainable: bool = True) -> dict[str, torch.Tensor]:
    """Copies of the trainable parameters, or of all."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad or not trainable}


def assert_same_weights(one: Any, other: Any, atol: float = 0.0) -> None:
    """That two trainers have ended at the same trainable parameters."""
    other_parameters = parameters(other.model)
    for name, parameter in parameters(one.model).items():
        torch.testing.assert_close(parameter, other_parameters[name], rtol=0, atol=atol, msg=lambda m, n=name: n + m)


def step_logs(trainer: Any) -> list[dict[str, float]]:
    """What was logged of training steps."""
    return [log for log in trainer.state.log_history if "loss" in log]


def watch_batches(
    trainer: Any,
    see_batch: Callable[[list[dict[str, Any]], dict[str, Any]], None],
    see_terms: Callable[[dict[str, torch.Tensor]], None],
) -> None:
    """
    Shows every batch that the trainer will generate from now on.

    Args:
        trainer ([`~trl_bayes.trainers.posterior_trainer.PosteriorTrainer`]): whose methods are wrapped.
        see_batch (`Callable`): called with the rows and with what TRL's
            `_generate_and_score_completions` made of them.
        see_terms (`Callable`): called with what the loss adds to that batch, where it does so after TRL has shuffled
            it; in the order from before.
    """
    generate, posterior_terms = trainer._generate_and_score_completions, trainer._posterior_terms

    def generate_and_show(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows = copy.deepcopy(inputs)  # an environment writes its prompt into them
        batch = generate(inputs)
        see_batch(rows, batch)
        return batch

    def terms_and_show(output: dict[str, Any], *args: Any) -> dict[str, torch.Tensor]:
        terms = posterior_terms(output, *args)
        if "row" in output:
            see_terms({name: term[output["row"].argsort()] for name, term in terms.items()})
        return terms

    trainer._generate_and_score_completions = generate_and_show
    trainer._posterior_terms = terms_and_show
