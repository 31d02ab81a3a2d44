"""Rows of several lengths in a batch: padded on the left, as far as a model generates behind padding as it does alone.

Most models do, by the mask and the positions that are made from it. Some recurrent ones have the padding in their
state, some adapters ignore positions, and some models mix up the rows of a batch: their samples would come from
another distribution than the one that scores them. So the first batch of each model is preceded by a check.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from trl.trainer.utils import pad


Batching = Literal["together", "by_length", "alone"]

_TOLERANCE = 0.01
"""Largest total variation between generation's law of a token and that of a forward pass, for float32."""

_TOLERANCE_OF_ROUNDING = 0.1
"""The same for bfloat16 and float16."""

_MOST_CHECKED = 8  # tokens of a row
_NUM_GENERATED = 3  # tokens: the first is the prompt's, the others come from the cache
_FOUND: WeakKeyDictionary[torch.nn.Module, Batching] = WeakKeyDictionary()


def pad_rows(rows: Sequence[list[int]], pad_token_id: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows padded to the longest: ids and mask, (B, L)."""
    side = "left" if left else "right"
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad(ids, pad_token_id, side), pad([torch.ones_like(row) for row in ids], 0, side)


def in_batches(model: PreTrainedModel, rows: Sequence[list[int]], padding: int) -> list[list[int]]:
    """
    Places of the rows that can be generated at once: all, those of one length, or each for itself.

    Args:
        model ([`~transformers.PreTrainedModel`]): in evaluation mode.
        rows (`list[list[int]]`): none empty.
        padding (`int`): any token.

    Raises:
        ValueError: even alone, a row is continued by another distribution than a forward pass gives; one sentence.
    """
    batching = _find_batching(model, min(rows, key=len), padding)
    if batching == "together":
        return [list(range(len(rows)))]
    if batching == "alone":
        return [[i] for i in range(len(rows))]
    places: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(len(row), []).append(i)
    return list(places.values())


def generate_plainly(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, config: GenerationConfig, **further: Any
) -> Any:
    """What `generate` returns for padded rows (B, L) and their mask, without the model's own settings."""
    with _plain_generation(model):
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **further)  # type: ignore[operator]


def law_of_forward_pass(model: PreTrainedModel, tokens: Tensor, number: int) -> Tensor:
    """The laws (number, V) of what follows the last tokens of a sequence (L,), by one forward pass."""
    return model(input_ids=tokens.unsqueeze(0)).logits[0, -number:].float().softmax(dim=1)


def short_rows(shortest: list[int], longest: list[int]) -> list[list[int]]:
    """Two rows of few tokens to check generation with, of which one is padded if the given ones differ in length."""
    short = shortest[:_MOST_CHECKED]
    return [short, longest[: len(short) + _MOST_CHECKED] if len(longest) > len(shortest) else short]


def row_and_longer(row: list[int]) -> list[list[int]]:
    """[`short_rows`] of a row and a longer one of its own tokens."""
    return short_rows(row, row * (1 + _MOST_CHECKED))


@torch.no_grad()
def _find_batching(model: PreTrainedModel, row: list[int], padding: int) -> Batching:
    """What a model allows, found once by continuing a short row beside a longer one, beside its like, and alone."""
    if model not in _FOUND:
        row, longer = row_and_longer(row)
        allowed = tolerance(model)
        checks: dict[Batching, list[list[int]]] = {"together": [row, longer], "by_length": [row, row], "alone": [row]}
        for batching, rows in checks.items():
            difference = largest_difference(model, rows, padding)
            if difference <= allowed:
                _FOUND[model] = batching
                break
        else:
            raise ValueError(
                f"The model {type(model).__name__} generates from another distribution than a forward pass gives "
                f"(total variation {difference:.2g} at one token), so its samples cannot be scored: use another "
                "architecture."
            )
    return _FOUND[model]


@torch.no_grad()
def largest_difference(
    model: PreTrainedModel, rows: Sequence[list[int]], padding: int, settings: Mapping[str, Any] | None = None
) -> float:
    """
    Total variation between generation's law of a token and a plain forward pass, the largest one; NaN if there is any,
    and 0 where a model's own `generate` tells tokens alone.

    It takes no random numbers: generation takes what is most probable.

    Args:
        model ([`~transformers.PreTrainedModel`]): in evaluation mode.
        rows (`list[list[int]]`): to be continued together, none empty.
        padding (`int`): any token.
        settings (`Mapping`, *optional*): how `generate` computes, such as `use_cache`.
    """
    config = GenerationConfig(
        max_new_tokens=_NUM_GENERATED,
        pad_token_id=padding,
        output_logits=True,
        return_dict_in_generate=True,
        **(settings or {}),
    )
    device = next(model.parameters()).device
    ids, mask = (each.to(device) for each in pad_rows(rows, padding, left=True))
    generated = generate_plainly(model, ids, mask, config)
    if getattr(generated, "logits", None) is None:
        return 0.0
    return distance_from_forward(model, generated, [len(row) + _NUM_GENERATED for row in rows])


def distance_from_forward(model: PreTrainedModel, generated: Any, lengths: Sequence[int]) -> float:
    """
    Total variation between generation's law of a token and a plain forward pass, the largest one; NaN if there is any.

    Args:
        model ([`~transformers.PreTrainedModel`]): in evaluation mode.
        generated (`Any`): what `generate` has returned, with `logits` and `sequences`, (B, L).
        lengths (`list[int]`): tokens of each sequence, the new ones included and the padding in front not.
    """
    laws = torch.stack(generated.logits).float().softmax(dim=2)  # (N, B, V)
    differences = [
        (laws[:, i] - law_of_forward_pass(model, generated.sequences[i, -length:-1], len(laws))).abs().sum(dim=1) / 2
        for i, length in enumerate(lengths)
    ]
    return torch.cat(differences).max().item()


def tolerance(model: PreTrainedModel, autocast: bool = False) -> float:
    """The largest total variation that rounding explains; with `autocast` weights are rounded when they are used."""
    return _TOLERANCE if is_exact(model) and not autocast else _TOLERANCE_OF_ROUNDING


def is_exact(model: torch.nn.Module) -> bool:
    """Whether a model's weights are of a precision in which rounding does not show."""
    return next(model.parameters()).dtype in (torch.float32, torch.float64)


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
