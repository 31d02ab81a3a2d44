"""Warnings that point at the user's line, however deep in constructors they arise."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


_PACKAGE = str(Path(__file__).parents[1]) + os.sep  # and not a neighbor whose name begins so


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line, outside of this package, that led here."""
    frame = _users_frame()
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno)


@contextmanager
def warnings_at_the_users_line() -> Iterator[None]:
    """
    Warnings that would point at a line of this package point at the user's.

    TRL warns of arguments at the line that calls its constructor, which is ours.
    """
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as recorded:
            caught = recorded
            yield
    finally:
        for warning in caught:
            filename, line = warning.filename, warning.lineno
            if filename.startswith(_PACKAGE):
                frame = _users_frame()
                filename, line = frame.f_code.co_filename, frame.f_lineno
            warnings.warn_explicit(warning.message, warning.category, filename, line)


def _users_frame() -> FrameType:
    """The innermost frame outside of this package and of context managers."""
    frame: FrameType = sys._getframe()
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_PACKAGE) or frame.f_globals.get("__name__") == "contextlib"
    ):
        frame = frame.f_back
    return frame
