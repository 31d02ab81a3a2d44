"""What a misspelled name was meant to be, for error messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """
    A question with the known name that is nearest, to stand behind the unknown one in a message.

    Args:
        word (`object`): what was given.
        known (`Iterable[str]`): what could have been.

    Returns:
        `str`: such as `" (did you mean 'dpg'?)"`, with its space; empty if none is near.
    """
    close = get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
