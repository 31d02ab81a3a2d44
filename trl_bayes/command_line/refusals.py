"""How a command refuses: one sentence on stderr and exit code 2, without a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


def refuse(program: str, message: str) -> NoReturn:
    """One sentence on stderr and exit code 2; of several processes only the first of each machine speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def one_sentence(
    program: str, errors: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)
) -> Iterator[None]:
    """
    Refuses with the message of an error, where it is one that the user can set right.

    Args:
        program (`str`): such as `"trl-bayes evaluate"`.
        errors (`tuple`, *optional*): which errors. Defaults to those of checking a configuration.
    """
    try:
        yield
    except errors as error:
        refuse(program, str(error) or type(error).__name__)
