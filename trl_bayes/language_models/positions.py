"""Positions under padding: a model that is scored is given those that generation gave it."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin


_HOW = "_prepare_position_ids_for_generation"  # of the models that need another way than the mask's


def give_positions(model: PreTrainedModel) -> None:
    """
    Makes a model derive its positions from the attention mask, as `generate` does, whenever it is called without any.

    With prompts padded on the left, a model with absolute positions (GPT-2) otherwise counts the padding: the scored
    log-probability is off by several nats for each sequence. Models without `position_ids` among their inputs, and
    those that find positions in a way of their own (vision-language models with positions in three dimensions), stay
    as they are.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model, not wrapped by an adapter.
    """
    finds_its_own = (
        getattr(type(model), _HOW, None) is not getattr(GenerationMixin, _HOW)  # noqa: B009 - not typed
    )
    if "position_ids" in inspect.signature(type(model).forward).parameters and not finds_its_own:
        model.register_forward_pre_hook(_add_positions, with_kwargs=True)


def _add_positions(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    mask = kwargs.get("attention_mask")
    is_continued = kwargs.get("past_key_values") is not None  # generation, which knows its positions
    if kwargs.get("position_ids") is not None or is_continued or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    return args, kwargs | {"position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0)}
