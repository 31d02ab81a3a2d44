"""Folders that results are written to."""

import tempfile
from pathlib import Path


def writable_folder(name: str) -> Path:
    """
    Makes the folder `output_dir`, where it is missing.

    Raises:
        ValueError: it cannot be written to or read; one sentence.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            next(folder.iterdir(), None)  # read too, for whether it is empty
    except OSError as error:
        raise ValueError(f"`output_dir={folder}` cannot be written to: {error.strerror or error}.") from None
    return folder
