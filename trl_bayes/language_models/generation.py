"""Plain ancestral sampling from a causal language model: what every sampler and every evaluation generates by.

Nothing but the model's own distribution at a temperature: no settings of its generation config, no dropout. Tokens in,
tokens out; who scores them, and for what, is decided elsewhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .batching import in_batches
from .completions import Prompt
from .settings import SamplingSettings
from .shrinking import generate_shrinking


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """
    A prompt's tokens, as TRL's trainers make them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's.
        prompt (`str` or `list`): a text, or messages to which the chat template is applied.
        chat_template_kwargs (`dict`, *optional*): what the chat template is given besides.

    Raises:
        ValueError: a prompt without tokens.
    """
    if isinstance(prompt, str):
        encoded: Any = tokenizer(text=prompt)
    else:
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
        )
    ids = list(encoded["input_ids"])
    if not ids:
        raise ValueError(
            f"The prompt {prompt!r} has no tokens, so the first token of a completion would have no distribution: "
            "use a tokenizer that adds a first token, or leave this prompt out."
        )
    return ids


def find_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    The tokens that end a completion: the tokenizer's and the model's, as in TRL.

    Raises:
        ValueError: there is none.
    """
    ends, own = model_stop_ids(model), tokenizer.eos_token_id
    stop_ids = ends if own is None or own in ends else [own, *ends]
    if not stop_ids:
        raise ValueError("Neither the tokenizer nor the model has an EOS token: set `tokenizer.eos_token`.")
    return stop_ids


def model_stop_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that end a completion by the model's generation config, of which there may be none."""
    config: Any = model.generation_config
    ends = config.eos_token_id if config is not None else None
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def with_stop_ids(
    settings: SamplingSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> SamplingSettings:
    """The settings with their own stop tokens, or else with those of the model, see [`find_stop_ids`]."""
    return settings if settings.stop_ids else replace(settings, stop_ids=tuple(find_stop_ids(model, tokenizer)))


def refuse_encoder_decoder(model: PreTrainedModel) -> None:
    """
    Refuses a model that reads a prompt in one part and writes a completion in another: both are one sequence here.

    Raises:
        ValueError: one sentence.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model, and completions are scored as the continuation of "
            "their prompt: use a decoder-only language model."
        )


@torch.no_grad()
def generate(model: PreTrainedModel, rows: Sequence[list[int]], settings: SamplingSettings) -> list[list[int]]:
    """
    Continues rows of tokens, all at once if the model does that as it does each alone.

    Args:
        model ([`~transformers.PreTrainedModel`]): in the mode that [`evaluating`] sets.
        rows (`list[list[int]]`): B rows, none empty.
        settings ([`SamplingSettings`]): with stop tokens, see [`with_stop_ids`]; seed and batch size are not read.

    Returns:
        `list[list[int]]`: the new tokens of each row, up to and with its first stop token.

    Raises:
        ValueError: the model generates from another distribution than a forward pass gives; one sentence.
    """
    stop_ids = list(settings.stop_ids)
    config = GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],  # any token will do: the mask hides it
    )
    continued: list[list[int]] = [[] for _ in rows]
    for batch in in_batches(model, rows, stop_ids[0]):
        for i, row in zip(batch, generate_shrinking(model, [rows[i] for i in batch], config), strict=True):
            continued[i] = _cut_at_stop(row, stop_ids)
    return continued


def _cut_at_stop(row: list[int], stop_ids: list[int]) -> list[int]:
    """A row as generated, up to and with its first stop token; what follows is padding."""
    return row[: next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, then every module's own mode again: a frozen or partly frozen model has both."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A random state of its own; the caller's is left as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
