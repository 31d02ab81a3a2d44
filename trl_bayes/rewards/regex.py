"""Evidence by a regular expression: a format that the completion must have, or something that must occur in it."""

import re
from typing import Any

from .texts import RewardFunction, completion_text, named, slug


def matches(
    pattern: str,
    full: bool = False,
    ignore_case: bool = False,
    multiline: bool = False,
    dot_matches_newline: bool = False,
    called: str | None = None,
) -> RewardFunction:
    """
    Makes the reward 1[the pattern is found in the completion].

    A pattern is compiled once and is the user's own: one with nested repetitions (`(a+)+b`) can take time that is
    exponential in the length of the completion.

    Args:
        pattern (`str`): a regular expression of Python's `re`.
        full (`bool`, *optional*, defaults to `False`): whether the whole completion must match, white space around it
            aside, and not a part of it.
        ignore_case (`bool`, *optional*, defaults to `False`): whether capitals do not matter (`re.IGNORECASE`).
        multiline (`bool`, *optional*, defaults to `False`): whether `^` and `$` match at each line (`re.MULTILINE`).
        dot_matches_newline (`bool`, *optional*, defaults to `False`): whether `.` matches everything (`re.DOTALL`).
        called (`str`, *optional*, defaults to `"matches_<pattern>"`): name in logs and targets.

    Returns:
        `Callable`: a reward function, 1.0 or 0.0 for every completion.

    Raises:
        ValueError: if `pattern` is not a regular expression.
    """
    flags = [(ignore_case, re.IGNORECASE), (multiline, re.MULTILINE), (dot_matches_newline, re.DOTALL)]
    try:
        compiled = re.compile(pattern, sum(flag for wanted, flag in flags if wanted))
    except (re.error, TypeError) as error:
        raise ValueError(f"`pattern` must be a regular expression, but {pattern!r} is not: {error}.") from None

    def reward(completions: list[Any], **kwargs: Any) -> list[float | None]:
        texts = [completion_text(completion) for completion in completions]
        found = [compiled.fullmatch(text.strip()) if full else compiled.search(text) for text in texts]
        return [float(match is not None) for match in found]

    return named(reward, called or f"matches_{slug(pattern)}")
