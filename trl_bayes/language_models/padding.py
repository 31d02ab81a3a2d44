"""Rows of several lengths in a batch, and whether a model generates behind padding as it does without."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


_TOLERANCE = 0.01
"""Largest total variation between two ways to find the law of a token, for float32."""

_TOLERANCE_OF_ROUNDING = 0.1
"""The same for bfloat16 and float16."""

_CHECKED: WeakSet[torch.nn.Module] = WeakSet()
_SEEN_THROUGH: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def pad_rows(rows: Sequence[list[int]], pad_token_id: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows padded to the longest: ids and mask, (B, L)."""
    length = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        padding, zeros = [pad_token_id] * (length - len(row)), [0] * (length - len(row))
        ids.append(padding + row if left else row + padding)
        mask.append(zeros + [1] * len(row) if left else [1] * len(row) + zeros)
    return torch.tensor(ids), torch.tensor(mask)


def generate_padded(model: PreTrainedModel, rows: Sequence[list[int]], config: GenerationConfig) -> list[list[int]]:
    """The tokens behind rows that are padded on the left, with no other settings than the given ones."""
    ids, generated = _call_generate(model, rows, config)
    return generated[:, ids.size(1) :].tolist()


def check_generation(model: PreTrainedModel, row: list[int], config: GenerationConfig) -> None:
    """
    Refuses a model that generates from another distribution than a forward pass gives, so that nobody can score it.

    It is checked once for each model, by the token behind a row without padding.

    Args:
        model ([`~transformers.PreTrainedModel`]): in evaluation mode.
        row (`list[int]`): any tokens.
        config ([`~transformers.GenerationConfig`]): of sampling, for its stop tokens and its padding.

    Raises:
        ValueError: one sentence.
    """
    if model in _CHECKED:
        return
    ids = torch.tensor([row], device=next(model.parameters()).device)
    forward = model(input_ids=ids).logits[0, -1].float().softmax(dim=0)
    difference = _total_variation(forward, _law_behind(model, [row], config))
    if not difference <= _allowed(model):  # NaN is more
        raise ValueError(
            f"The model {type(model).__name__} generates from another distribution than a forward pass gives (total "
            f"variation {difference:.2g} at one token), so its samples cannot be scored: use another architecture."
        )
    _CHECKED.add(model)


def sees_through_padding(
    model: PreTrainedModel, shorter: list[int], longer: list[int], config: GenerationConfig
) -> bool:
    """
    Whether a model generates behind padding as without: most do, by mask and positions; some recurrent ones do not.

    It is found out once for each model, by the token behind a row that is alone or padded to a longer one.

    Args:
        model ([`~transformers.PreTrainedModel`]): in evaluation mode.
        shorter, longer (`list[int]`): two rows.
        config ([`~transformers.GenerationConfig`]): of sampling, for its stop tokens and its padding.
    """
    if model not in _SEEN_THROUGH:
        alone, padded = (_law_behind(model, rows, config) for rows in ([shorter], [shorter, longer]))
        _SEEN_THROUGH[model] = _total_variation(alone, padded) <= _allowed(model)
    return _SEEN_THROUGH[model]


def _law_behind(model: PreTrainedModel, rows: Sequence[list[int]], config: GenerationConfig) -> Tensor:
    """The distribution (V,) from which the token behind the first row is drawn."""
    single = GenerationConfig(
        max_new_tokens=1,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    _, generated = _call_generate(model, rows, single)
    return generated.logits[0][0].float().softmax(dim=0)


def _call_generate(model: PreTrainedModel, rows: Sequence[list[int]], config: GenerationConfig) -> tuple[Tensor, Any]:
    """What `generate` is given (B, L), and what it returns."""
    device = next(model.parameters()).device
    padding: Any = config.pad_token_id
    ids, mask = (t.to(device) for t in pad_rows(rows, padding, left=True))
    with _plain_generation(model):
        return ids, model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]


def _total_variation(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().sum().item() / 2


def _allowed(model: PreTrainedModel) -> float:
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return _TOLERANCE if exact else _TOLERANCE_OF_ROUNDING


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
