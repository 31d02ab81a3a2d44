"""Generation whose batch shrinks: rows that have ended leave it, so that the longest does not cost what all would.

`generate` of transformers computes every row until the last has ended. Here it stops when at most half of the rows go
on, these are chosen from the cache of keys and values, and it is called again for them. That takes a cache with a row
for each row and no other state, and a model that goes on from it as it would from the beginning: the first is looked
at in each call, the second is tried once for each model.
"""

import inspect
from collections.abc import Sequence
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer

from .batching import distance_from_forward, generate_plainly, pad_rows, row_and_longer, tolerance


_FEWEST = 8  # rows of a batch that is worth the trouble
_TRIED: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


class _HalfHaveEnded(StoppingCriteria):
    """Stops all rows when at most half of them go on."""

    def __init__(self, stop_ids: Tensor, start: int):
        self.stop_ids, self.start = stop_ids, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        going_on = ~_ended(input_ids[:, self.start :], self.stop_ids)
        return torch.full_like(going_on, bool(2 * going_on.sum() <= len(going_on)))


def generate_shrinking(model: PreTrainedModel, rows: Sequence[list[int]], config: GenerationConfig) -> list[list[int]]:
    """
    Rows continued with no other settings than the given ones.

    Args:
        model ([`~transformers.PreTrainedModel`]): in evaluation mode.
        rows (`list[list[int]]`): B rows, none empty, which the model may be given together.
        config ([`~transformers.GenerationConfig`]):
            With `eos_token_id` as a list, `pad_token_id` and `max_new_tokens`.

    Returns:
        `list[list[int]]`: the new tokens of each row; behind its first stop token there may be others.
    """
    padding: Any = config.pad_token_id
    ids, mask = (each.to(next(model.parameters()).device) for each in pad_rows(rows, padding, left=True))
    stops, start = torch.tensor(config.eos_token_id, device=ids.device), ids.size(1)
    end, cache = start + (config.max_new_tokens or 0), None
    places, continued = torch.arange(len(rows)), [[] for _ in rows]  # type: ignore[var-annotated]
    shrinks = len(rows) >= _FEWEST and _goes_on_from_a_cache(model, rows, padding)
    while True:
        further: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        if shrinks and len(ids) >= _FEWEST:
            further["stopping_criteria"] = StoppingCriteriaList([_HalfHaveEnded(stops, start)])
        settings = copy(config)
        settings.max_new_tokens, settings.return_dict_in_generate = end - ids.size(1), True
        generated = generate_plainly(model, ids, mask, settings, **further)
        going_on = (~_ended(generated.sequences[:, start:], stops)).nonzero().squeeze(1)
        for place, row in zip(places.tolist(), generated.sequences[:, start:].tolist(), strict=True):
            continued[place] = row
        if not len(going_on) or generated.sequences.size(1) >= end:
            return continued
        cache = _cache(generated)
        cache.batch_select_indices(going_on)
        new = mask.new_ones(len(going_on), generated.sequences.size(1) - ids.size(1))
        ids, mask = generated.sequences[going_on], torch.cat([mask[going_on], new], dim=1)
        places = places[going_on.cpu()]


def _ended(new: Tensor, stop_ids: Tensor) -> Tensor:
    """(B,) whether each row has a stop token among the new ones (B, T)."""
    return torch.isin(new, stop_ids).any(dim=1)


def _cache(generated: Any) -> Any:
    """The cache of what has been generated, if rows can be chosen from it; else `None`."""
    cache = generated.past_key_values
    plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    # One position for each token but the last: no virtual ones of an adapter
    return cache if plain and cache.get_seq_length() == generated.sequences.size(1) - 1 else None


@torch.no_grad()
def _goes_on_from_a_cache(model: PreTrainedModel, rows: Sequence[list[int]], padding: int) -> bool:
    """Whether rows can be chosen and continued: tried on a short row, behind padding, and a longer one."""
    if model not in _TRIED:
        own: Any = model.generate
        takes_all = any(each.kind == each.VAR_KEYWORD for each in inspect.signature(own).parameters.values())
        _TRIED[model] = takes_all and _try(model, min(rows, key=len), padding)
    return _TRIED[model]


def _try(model: PreTrainedModel, row: list[int], padding: int) -> bool:
    device = next(model.parameters()).device
    row, longer = row_and_longer(row)
    ids, mask = (each.to(device) for each in pad_rows([row, longer, row], padding, left=True))
    config = GenerationConfig(max_new_tokens=2, pad_token_id=padding, return_dict_in_generate=True)
    generated = generate_plainly(model, ids, mask, config)
    cache = _cache(generated)
    if cache is None:
        return False
    chosen = torch.tensor([2, 1], device=device)
    cache.batch_select_indices(chosen)
    config = GenerationConfig(max_new_tokens=2, pad_token_id=padding, return_dict_in_generate=True, output_logits=True)
    mask = torch.cat([mask[chosen], mask.new_ones(2, 2)], dim=1)
    continued = generate_plainly(model, generated.sequences[chosen], mask, config, past_key_values=cache)
    # Two tokens were generated before, and two are now
    return distance_from_forward(model, continued, [len(row) + 4, len(longer) + 4]) <= tolerance(model)
