"""Plain ancestral sampling from a causal language model: what every sampler and every evaluation generates by.

Nothing but the model's own distribution at a temperature: no settings of its generation config, no dropout. Tokens in,
tokens out; who scores them, and for what, is decided elsewhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .completions import Prompt
from .settings import SamplingSettings


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """
    A prompt's tokens, as TRL's trainers make them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's.
        prompt (`str` or `list`): a text, or messages to which the chat template is applied.

    Raises:
        ValueError: a prompt without tokens.
    """
    if isinstance(prompt, str):
        encoded: Any = tokenizer(text=prompt)
    else:
        encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
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
    config: Any = model.generation_config
    ends = config.eos_token_id if config is not None else None
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    own = tokenizer.eos_token_id
    stop_ids = ends if own is None or own in ends else [own, *ends]
    if not stop_ids:
        raise ValueError("Neither the tokenizer nor the model has an EOS token: set `tokenizer.eos_token`.")
    return stop_ids


def with_stop_ids(
    settings: SamplingSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> SamplingSettings:
    """The settings with their own stop tokens, or else with those of the model, see [`find_stop_ids`]."""
    return settings if settings.stop_ids else replace(settings, stop_ids=tuple(find_stop_ids(model, tokenizer)))


@torch.no_grad()
def generate(model: PreTrainedModel, rows: Sequence[list[int]], settings: SamplingSettings) -> list[list[int]]:
    """
    Continues rows of tokens, all at once.

    Args:
        model ([`~transformers.PreTrainedModel`]): in the mode that [`evaluating`] sets.
        rows (`list[list[int]]`): B rows, none empty.
        settings ([`SamplingSettings`]): with stop tokens, see [`with_stop_ids`]; seed and batch size are not read.

    Returns:
        `list[list[int]]`: the new tokens of each row, up to and with its first stop token.
    """
    stop_ids = list(settings.stop_ids)
    padding = stop_ids[0]  # any token will do: the mask hides it
    config = GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=padding,
    )
    device = next(model.parameters()).device
    ids, mask = (t.to(device) for t in pad_rows(rows, padding, left=True))
    with _plain_generation(model):
        generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
    return [_cut_at_stop(row, stop_ids) for row in generated[:, ids.size(1) :].tolist()]


def _cut_at_stop(row: list[int], stop_ids: list[int]) -> list[int]:
    """A row as generated, up to and with its first stop token; what follows is padding."""
    return row[: next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))]


def pad_rows(rows: Sequence[list[int]], pad_token_id: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows padded to the longest: ids and mask, (B, L)."""
    length = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        padding, zeros = [pad_token_id] * (length - len(row)), [0] * (length - len(row))
        ids.append(padding + row if left else row + padding)
        mask.append(zeros + [1] * len(row) if left else [1] * len(row) + zeros)
    return torch.tensor(ids), torch.tensor(mask)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, then every module's own mode again."""
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


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's own generation settings: `generate` reads what a call leaves open from there.

    A repetition penalty in a checkpoint's generation_config.json would change the distribution unnoticed. An adapter
    and its base model both have settings.
    """
    owners: list[Any] = [m for m in model.modules() if isinstance(vars(m).get("generation_config"), GenerationConfig)]
    own = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, own, strict=True):
            owner.generation_config = config
