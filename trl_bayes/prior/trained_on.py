"""Which draws of the prior a policy was trained on: these say nothing of how near it is to any distribution."""

import json
from pathlib import Path

from .writing import write_whole


_FILE = "trained_on_prior_samples.json"


def mark_trained_on(folder: Path, draw: str, trainer: str) -> None:
    """
    Remembers in a folder that a policy learns to produce the completions of a draw themselves.

    Args:
        folder (`Path`): of the policy, or of the draw.
        draw (`str`): [`~trl_bayes.prior.DrawIdentity.fingerprint`]; the same completions may be in several folders.
        trainer (`str`): its class, for whoever reads it.
    """
    known = _read(folder / _FILE)
    if draw not in known:
        text = json.dumps({**known, draw: trainer}, indent=1) + "\n"
        write_whole(folder / _FILE, lambda path: path.write_text(text))


def draws_trained_on(folder: str | Path) -> set[str]:
    """The draws that are marked in a folder, or in the one that it is in, if it is a checkpoint."""
    place = Path(folder)
    return {*_read(place / _FILE), *_read(place.parent / _FILE)}


def _read(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text()) if file.is_file() else {}
    except (json.JSONDecodeError, OSError):  # somebody else's file of this name
        return {}
    return found if isinstance(found, dict) else {}
