"""Evidence about length: as a condition, or as a number whose mean [`~trl_bayes.targets.Moments`] can set."""

import math
from collections.abc import Callable
from typing import Any

from .texts import RewardFunction, completion_text, named


_UNITS: dict[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "characters": len,
    "lines": lambda text: len(text.strip().splitlines()),
}


def length_in(unit: str = "words", called: str | None = None) -> RewardFunction:
    """
    Makes the reward that is the completion's length.

    Args:
        unit (`str`, *optional*, defaults to `"words"`): `words`, `characters`, `lines` or `tokens`; tokens are the
            policy's own, which the trainer passes as `completion_ids`, the end-of-text token included.
        called (`str`, *optional*, defaults to `"length_in_<unit>"`): name in logs and targets.

    Returns:
        `Callable`: a reward function.

    Raises:
        ValueError: if there is no such unit.
    """
    measure = _measure(unit)

    def reward(
        completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[float | None]:
        return [float(number) for number in measure(completions, completion_ids)]

    return named(reward, called or f"length_in_{unit}")


def length_between(
    minimum: float = 0, maximum: float = math.inf, unit: str = "words", called: str | None = None
) -> RewardFunction:
    """
    Makes the reward 1[the completion is neither too short nor too long], both ends included.

    [`max_length`] is about the prompt and the completion together, in characters; this is about the completion alone.

    Args:
        minimum (`int`, *optional*, defaults to `0`): the least length.
        maximum (`int`, *optional*): the greatest length; no limit by default.
        unit (`str`, *optional*, defaults to `"words"`): as for [`length_in`].
        called (`str`, *optional*, defaults to `"length_between"`): name in logs and targets.

    Returns:
        `Callable`: a reward function, 1.0 or 0.0 for every completion.

    Raises:
        ValueError: if there is no such unit, or no length between the two.
    """
    measure = _measure(unit)
    if isinstance(minimum, str) or isinstance(maximum, str) or not 0 <= minimum <= maximum:
        raise ValueError(f"`minimum` must be 0 or more, and `maximum` not below it, but got {minimum} and {maximum}.")

    def reward(
        completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[float | None]:
        return [float(minimum <= number <= maximum) for number in measure(completions, completion_ids)]

    return named(reward, called or "length_between")


def _measure(unit: str) -> Callable[[list[Any], list[list[int]] | None], list[int]]:
    if unit == "tokens":
        return _count_tokens
    if unit not in _UNITS:
        raise ValueError(f"Unknown `unit={unit!r}`: use one of {[*_UNITS, 'tokens']}.")
    count = _UNITS[unit]
    return lambda completions, completion_ids: [count(completion_text(completion)) for completion in completions]


def _count_tokens(completions: list[Any], completion_ids: list[list[int]] | None) -> list[int]:
    if completion_ids is None:
        raise ValueError("A length in tokens needs `completion_ids`, which TRL's trainers pass: choose another unit.")
    return [len(ids) for ids in completion_ids]
