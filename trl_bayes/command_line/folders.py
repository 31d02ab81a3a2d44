"""Output folders: made, tried, and not written over."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def gone_if_unused(output_dir: str) -> Iterator[None]:
    """After a failure, removes the folder, and those above it, that were not there before and have nothing in them."""
    folder = Path(output_dir).expanduser()
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for each in new:
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()
        raise


def prepare_folder(output_dir: str, overwrite: bool, instead: str = "", unfinished: str | None = None) -> Path:
    """
    Makes sure that results can be written, and are not written over others.

    Args:
        output_dir (`str`): the folder; `~` is the user's.
        overwrite (`bool`): whether it may have something in it.
        instead (`str`, *optional*): what else may be set where it has, for the message.
        unfinished (`str`, *optional*): what may be in it all the same, of a run that was stopped and goes on.

    Raises:
        ValueError: it is in use, or cannot be written to; one sentence.
    """
    folder = Path(output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        in_use = any(entry.name != unfinished for entry in folder.iterdir())
    except OSError as error:
        raise ValueError(f"`output_dir={folder}` cannot be written to: {error.strerror or error}.") from None
    if in_use and not overwrite:
        raise ValueError(f"`output_dir={folder}` is not empty: name another folder, or set `--overwrite`{instead}.")
    return folder
