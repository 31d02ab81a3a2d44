"""What a process must remember across a restart besides model and optimizer, as a file in TRL's checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig
from trl.trainer.utils import get_config_model_id

from ..language_models.fingerprint import parameters_fingerprint, weights_fingerprint
from ..targets import Target
from .prior_model import adapter_of_prior
from .warnings_of_users import warn


_SINCE_LATER = ("temperature", "max_completion_length", "rewards", "prior")
"""What checkpoints of the first versions do not say."""


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint in a folder that a kill has left whole, if there is any: its trainer's state comes last."""
    states = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    numbered = {
        int(number): file.parent for file in states if (number := file.parent.name.rpartition("-")[2]).isdigit()
    }
    return str(numbered[max(numbered)]) if numbered else None


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


def run_identity(trainer_class: type, target: Target, args: GRPOConfig) -> dict[str, Any]:
    """By which the checkpoint of a run of another trainer or target, or with other outcomes, is recognized."""
    return {
        "trainer": trainer_class.__name__,
        "target_settings": repr(target),
        "temperature": float(args.temperature),
        "max_completion_length": args.max_completion_length,
    }


def evidence_identity(trainer: Any) -> dict[str, Any]:
    """
    By which the checkpoint of a run with another prior or other rewards is recognized; without what cannot be told.

    Args:
        trainer ([`~trl_bayes.trainers.posterior_trainer.PosteriorTrainer`]): constructed.
    """
    weights = dict(zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True))
    read = trainer.target.names_read() or [name for name, weight in weights.items() if weight != 0]
    prior = _prior_identity(trainer)
    return {"rewards": {name: weights[name] for name in read}, **({} if prior is None else {"prior": prior})}


def _prior_identity(trainer: Any) -> str | None:
    """The prior's weights, by the files of its folder, and the adapter that it is."""
    if trainer.beta == 0:
        return None
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    config: Any = trainer.accelerator.unwrap_model(model).config
    weights = weights_fingerprint(trainer.args.prior_model_name_or_path or get_config_model_id(config))
    adapter = adapter_of_prior(trainer)
    parts = [weights, parameters_fingerprint(adapter)] if adapter else [weights]
    return None if None in parts else " ".join(map(str, parts))


def check_same_run(state: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """
    Refuses the state of a run whose posterior is another: what it has learned is not of this one.

    Args:
        state (`Mapping[str, Any]`): from [`read_state`].
        ours (`Mapping[str, Any]`): [`run_identity`] of this run and, where it has its models, [`evidence_identity`].

    Raises:
        ValueError: one sentence.
    """
    for name, value in ours.items():
        before = state.get(name, value if name in _SINCE_LATER else None)
        if before == value:
            continue
        if name == "prior":
            raise ValueError(
                "The checkpoint was written by a run whose prior has other weights than this one's, so it was on its "
                "way to another posterior: start from the same model as that run, and name the checkpoint in "
                "`resume_from_checkpoint` only."
            )
        what = f"`{name}={before}`" if name in _SINCE_LATER else before
        raise ValueError(
            f"The checkpoint was written by a run with {what}, this one has {value}: resume with the same trainer, "
            "target, rewards and sampling, or start a new run from the checkpoint's weights."
        )
    if "partition" not in state:
        raise ValueError(
            "The checkpoint was written by an earlier version of trl_bayes, which kept log Z in another form: start a "
            "new run from the checkpoint's weights."
        )
