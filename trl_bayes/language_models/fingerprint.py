"""Which weights a model id stands for, so that what was computed with others is not mistaken for theirs."""

import hashlib
from pathlib import Path


_WEIGHTS = ("*.safetensors", "*.bin")
_PARTS = 16  # of each file that are read, evenly spread
_PART_SIZE = 65_536  # bytes


def weights_fingerprint(model_id: str) -> str | None:
    """
    A fingerprint of the weights in a local folder; `None` for a model of the Hub, whose commit says the same.

    It reads the size of each file and 16 parts of it, not the whole: training changes all of a matrix a little, so it
    shows in any part, and a model of many gigabytes is still read in a moment.

    Args:
        model_id (`str`): folder, or id on the Hub.
    """
    files = sorted(file for pattern in _WEIGHTS for file in Path(model_id).glob(pattern))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as weights:
            for part in range(_PARTS):
                weights.seek(part * max(size - _PART_SIZE, 0) // (_PARTS - 1))
                digest.update(weights.read(_PART_SIZE))
    return digest.hexdigest()[:16]
