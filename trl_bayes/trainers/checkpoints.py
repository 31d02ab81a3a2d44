"""What a process must remember across a restart besides model and optimizer, as a file in TRL's checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..targets import Target
from .warnings_of_users import warn


def state_file(checkpoint: str | Path, process_index: int) -> Path:
    """The file of a process in a checkpoint's folder."""
    return Path(checkpoint) / f"posterior_state_{process_index}.pt"


def save_state(checkpoint: Path, process_index: int, state: Mapping[str, Any]) -> None:
    """
    Writes the state of a process, before TRL writes the rest: a checkpoint that a kill leaves without this file is not
    a complete one.
    """
    checkpoint.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), state_file(checkpoint, process_index))


def read_state(checkpoint: str | Path, process_index: int) -> dict[str, Any] | None:
    """
    The state of a process, or `None`, with a warning, where the checkpoint has none.

    With more processes than before, the first one's stands for all: all that they know is the same, but not what they
    replay.
    """
    own = state_file(checkpoint, process_index)
    file = next((file for file in (own, state_file(checkpoint, 0)) if file.exists()), None)
    if file is None:
        warn(f"{own} is missing: what was learned about Z and the target starts afresh.")
        return None
    state = torch.load(file, weights_only=True)
    if file != own:
        state.pop("replay_buffer", None)
    return state


def run_identity(trainer_class: type, target: Target) -> dict[str, str]:
    """By which the checkpoint of a run of another trainer or target is recognized."""
    return {"trainer": trainer_class.__name__, "target_settings": repr(target)}


def check_same_run(state: Mapping[str, Any], ours: Mapping[str, str]) -> None:
    """
    Refuses the state of a run of another trainer or target.

    Args:
        state (`Mapping[str, Any]`): from [`read_state`].
        ours (`Mapping[str, str]`): [`run_identity`] of this run.

    Raises:
        ValueError: one sentence.
    """
    for name, value in ours.items():
        if state.get(name) != value:
            raise ValueError(
                f"The checkpoint was written by a run with {state.get(name)}, this one has {value}: resume with the "
                "same trainer and target, or start a new run from the checkpoint's weights."
            )
    if "partition" not in state:
        raise ValueError(
            "The checkpoint was written by an earlier version of trl_bayes, which kept log Z in another form: start a "
            "new run from the checkpoint's weights."
        )
