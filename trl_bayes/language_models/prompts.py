"""What a prompt must be for a model to continue it: checked for all prompts before anything is generated."""

import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .generation import tokenize_prompt


_MOST_BYTES_OF_A_TEMPLATE = 4096  # that it adds to a conversation; longer ones than this leaves room for are tokenized


def check_prompt(prompt: Any) -> None:
    """
    Refuses what is neither a text nor a list of messages, such as a blank or numeric cell of a table.

    Raises:
        ValueError: one sentence.
    """
    if isinstance(prompt, str):
        return
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        return
    what = "missing" if prompt is None else repr(prompt)
    raise ValueError(f"A prompt of the data is {what}: make it a text, or a list of messages, or leave its row out.")


def _is_message(each: Any) -> bool:
    """Whether it has a role and something to say; a chat template writes a blank cell as the word "None"."""
    if not isinstance(each, Mapping) or "role" not in each:
        return False
    return isinstance(each.get("content"), str | list) or bool(each.get("tool_calls"))


def check_prompts(
    prompts: Iterable[Any],
    tokenizer: Any,
    model: torch.nn.Module,
    *,
    max_completion_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_scaling: bool = False,
) -> None:
    """
    Refuses prompts that cannot be continued to the length asked for.

    A prompt must be a text or messages, have tokens, and, if it is one of messages, a chat template to be written by.
    With its completion it must fit into the positions of a model that has a table of them (GPT-2, OPT), or whose
    rotary positions are scaled by the length of what is read; others have no such limit.

    Args:
        prompts (`Iterable`): texts, or lists of messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's. With a processor only the type is checked.
        model (`torch.nn.Module`): the language model.
        max_completion_length (`int`): tokens of the longest completion.
        chat_template_kwargs (`dict`, *optional*): for the chat template.
        allow_scaling (`bool`, *optional*, defaults to `False`): to go beyond where a RoPE scaling sets in.

    Raises:
        ValueError: one sentence.
    """
    positions = number_of_positions(model)
    before_scaling = None if allow_scaling else positions_before_scaling(model)
    if before_scaling is not None:
        positions = before_scaling
    of = "" if before_scaling is None else ", behind which its RoPE scaling depends on the length"
    room = None if positions is None else positions - max_completion_length
    prefilled = False
    for prompt in prompts:
        check_prompt(prompt)
        prefilled |= not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            continue
        if not isinstance(prompt, str) and tokenizer.chat_template is None:
            raise ValueError(
                "The prompts are messages, and the tokenizer has no chat template to write them by: use a chat model, "
                "set `tokenizer.chat_template`, or make the prompts texts."
            )
        if not _may_be_wrong(prompt, room):
            continue
        number = len(tokenize_prompt(tokenizer, prompt, chat_template_kwargs))  # which refuses one without any
        if room is not None and number > room:
            raise ValueError(
                f"A prompt of {number} tokens and a completion of `max_completion_length={max_completion_length}` do "
                f"not fit into the model's {positions} positions{of}: lower `max_completion_length`, or shorten the "
                "prompt or leave it out."
            )
    if prefilled:
        warnings.warn(
            "A prompt ends with a message of the assistant. TRL begins a new turn behind it, and does not go on in "
            "it: leave the message out, or write the prompt as a text.",
            stacklevel=2,
        )


def number_of_positions(model: torch.nn.Module) -> int | None:
    """How many tokens a model with a table of positions can read; `None` for one without such a table."""
    config: Any = model.config
    declared = getattr(config.get_text_config(), "max_position_embeddings", None)
    if declared is None:
        return None
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        shape = getattr(tensor, "ds_shape", tensor.shape)  # of a weight that ZeRO-3 has sharded
        is_of_positions = "position" in name or ".wpe." in f".{name}."
        if is_of_positions and len(shape) > 1 and declared <= shape[0] < 2 * declared:
            return int(declared)
    return None


def positions_before_scaling(model: torch.nn.Module) -> int | None:
    """
    How many tokens a model reads before it turns to other rotary frequencies; `None` for one that never does.

    With `dynamic` and `longrope` scaling they depend on the length of what is read. A completion that goes beyond this
    number is sampled with those of each length that it goes through, and scored with those of its whole length.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    rope = getattr(config, "rope_parameters", None) or {}
    of_layers = [each for each in rope.values() if isinstance(each, Mapping)]  # where kinds of layers have their own
    limits = []
    for each in [rope, *of_layers]:
        if each.get("rope_type") == "longrope":
            own = each.get("original_max_position_embeddings")
            limits.append(own or getattr(config, "original_max_position_embeddings", config.max_position_embeddings))
        if each.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def _may_be_wrong(prompt: Any, room: int | None) -> bool:
    """Whether tokens have to be counted: a token is a byte at least, so short prompts fit, and texts have some."""
    if isinstance(prompt, str):
        return not prompt.strip() or (room is not None and len(prompt.encode()) + 1 > room)
    return room is not None and len(repr(prompt).encode()) + _MOST_BYTES_OF_A_TEMPLATE > room
