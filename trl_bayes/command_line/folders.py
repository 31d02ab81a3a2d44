"""Output folders: made, tried, and not written over."""

import tempfile
from pathlib import Path


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
