"""Pairwise judges: a callable that says which of two completions is better, and what may come back from one."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch


Judge = Callable[..., Sequence[Any]]
"""
`judge(prompts, completions)`, with `completions` a list of pairs: for each pair the probability that its first
completion is better (a `float`), or the index of the better one (an `int`, 0 or 1); -1 or `None` where it cannot say.
One with `**kwargs` is given the other columns of the data as well.
"""


def ask(
    judge: Judge,
    prompts: Sequence[Any],
    pairs: Sequence[tuple[Any, Any]],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> torch.Tensor:
    """
    The probability that a judge prefers the first completion of each pair, `(M,)`; `NaN` where it cannot say.

    The judge sees each pair in random order, since judges may favor a place. The order is drawn by torch's generator.

    Args:
        judge ([`Judge`]): who is asked.
        prompts (`Sequence`): one for each pair, texts or lists of messages.
        pairs (`Sequence[tuple]`): two completions each.
        columns (`Mapping`, *optional*): further columns of the data, with one entry for each pair.

    Raises:
        ValueError: something else than one probability or index for each pair; one sentence.
    """
    swapped = (torch.rand(len(pairs)) < 0.5).tolist()
    shown = [list(pair[::-1] if swap else pair) for pair, swap in zip(pairs, swapped, strict=True)]
    verdicts = judge(list(prompts), shown, **(columns or {} if _takes_columns(judge) else {}))
    try:
        found = list(verdicts)
    except TypeError:
        raise ValueError(
            f"The judge returned {type(verdicts).__name__}: return a list, a probability or an index for each pair."
        ) from None
    if len(found) != len(pairs):
        raise ValueError(f"The judge returned {len(found)} verdicts for {len(pairs)} pairs: return one for each.")
    first = [_probability(verdict) for verdict in found]
    return torch.tensor([1 - p if swap else p for p, swap in zip(first, swapped, strict=True)])


def refuse_uncallable(judge: Any) -> None:
    """
    Refuses what cannot be called as a judge is.

    Raises:
        TypeError: one sentence.
    """
    if not callable(judge):
        raise TypeError(f"`judge` must be a callable `judge(prompts, pairs)`, got {type(judge).__name__}.")
    if inspect.iscoroutinefunction(judge):
        raise TypeError("`judge` is a coroutine function, and a verdict is not waited for: give a plain function.")
    try:
        if _takes_columns(judge):
            inspect.signature(judge).bind_partial([], [])
        else:
            inspect.signature(judge).bind([], [])
    except TypeError as error:
        raise TypeError(
            f"`judge` cannot be called as `judge(prompts, pairs)` ({error}): take these two, and `**columns` for the "
            "other columns of the data."
        ) from None


def _probability(verdict: Any) -> float:
    """That the first is better, from a probability or an index."""
    if verdict is None:
        return math.nan
    if isinstance(verdict, torch.Tensor) and verdict.dim() == 0:
        verdict = verdict.item()
    if isinstance(verdict, Integral) and not isinstance(verdict, bool) and verdict in (-1, 0, 1):
        return math.nan if verdict == -1 else 1.0 - float(verdict)
    is_real = isinstance(verdict, Real) and not isinstance(verdict, Integral)
    if is_real and (math.isnan(verdict) or 0 <= float(verdict) <= 1):
        return float(verdict)
    raise ValueError(
        f"The judge returned {verdict!r}: return for each pair the probability that its first completion is better (a "
        "float from 0 to 1), or the index of the better one (0 or 1; -1 for none)."
    )


def _takes_columns(judge: Judge) -> bool:
    kinds = {parameter.kind for parameter in inspect.signature(judge).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds
