"""What long work shows while it goes on: a bar in a terminal, a line a minute in a file."""

import sys
from typing import Any

from tqdm import tqdm


_LINE = "{desc}: {n_fmt} of {total_fmt} completions, {rate_fmt}, {remaining} left\n"
_MINUTE = 60.0


def progress_bar(what: str, total: int, done: int = 0, shown: bool = True) -> "tqdm[Any]":
    """
    A bar to be updated by hand. Where standard error is no terminal it is a line a minute, from the first minute on.

    Args:
        what (`str`): what is going on, such as `"sampling"`.
        total (`int`): completions.
        done (`int`, *optional*, defaults to `0`): how much of it was there before.
        shown (`bool`, *optional*, defaults to `True`): whether to show anything.
    """
    if sys.stderr.isatty():
        return tqdm(desc=what, total=total, initial=done, unit=" completions", disable=not shown)
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit=" completions",
        disable=not shown,
        bar_format=_LINE,
        mininterval=_MINUTE,
        delay=_MINUTE,  # what takes less says nothing
    )
