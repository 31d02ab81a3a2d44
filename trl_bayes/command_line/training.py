"""What all training commands share: from a recipe and flags to a trained, saved and described model."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from packaging.version import Version
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import get_peft_config, get_quantization_config

from ..language_models.adapters import base_of_adapter
from ..prior import PriorSamplesError
from ..rewards.calling import check_reward_arguments
from ..targets import build_target
from ..trainers.checkpoints import check_same_run, last_whole_checkpoint, run_identity, state_file
from ..trainers.posterior_config import PosteriorConfig
from ..trainers.posterior_trainer import PosteriorTrainer
from ..trainers.refusals import refuse_too_few_prompts
from .arguments import Arguments
from .data import hub_dataset, load_data, select_split
from .extras import check_extras
from .folders import gone_if_unused, prepare_folder
from .launch import already_launched, launch
from .models import find_config, load_tokenizer, load_trainable_adapter, loading_arguments, model_path
from .prompts import PromptError
from .recipe import check_trainer, make_arguments, read_command_line, training_parser
from .refusals import one_sentence
from .rewards import check_reward_models, find_rewards


def run(
    name: str, trainer_class: type[PosteriorTrainer], argv: Sequence[str] | None = None, description: str | None = None
) -> None:
    """
    Trains by a command line, in this process, or in several if it has options of `accelerate launch`.

    Args:
        name (`str`): of the command, such as `"f-dpg"`.
        trainer_class (`type`): the trainer; its `config_class` gives the fields.
        argv (`Sequence[str]`, *optional*): what stands behind the command; defaults to `sys.argv[1:]`.
        description (`str`, *optional*): first lines of the help.

    Raises:
        SystemExit: code 2 after one sentence on stderr, for anything that is wrong with the configuration.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = training_parser(name, trainer_class, description)
    with one_sentence(parser.prog):
        launcher_flags, own_args = read_command_line(parser, argv)
        if launcher_flags and not already_launched():
            return launch(f"trl_bayes.commands.{name.replace('-', '_')}", launcher_flags, own_args)
        arguments = make_arguments(parser, own_args)
        check_trainer(arguments.script, trainer_class)
        with gone_if_unused(str(arguments.training.output_dir)):
            checkpoint = prepare_output_dir(trainer_class, arguments)
            trainer = make_trainer(trainer_class, arguments)
    with one_sentence(parser.prog, (PriorSamplesError, PromptError)):  # other errors keep their traceback
        train(trainer, arguments, checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# The output folder and the checkpoint to resume from


def prepare_output_dir(trainer_class: type[PosteriorTrainer], arguments: Arguments) -> str | None:
    """
    Makes sure that results can be written, and are not written over others.

    Returns:
        `str`, *optional*: the checkpoint to resume from.

    Raises:
        ValueError: the folder is in use or cannot be written to, or there is no such checkpoint; one sentence.
    """
    args = arguments.training
    checkpoint = find_checkpoint(args)
    if checkpoint is not None:
        _check_posterior_state(Path(checkpoint), trainer_class, args)
    if args.process_index != 0:
        return checkpoint  # by now the first process may have begun to write
    prepare_folder(
        str(args.output_dir),
        arguments.script.overwrite or checkpoint is not None,
        ", or `--resume_from_checkpoint true` to go on from the last checkpoint in it",
    )
    return checkpoint


def find_checkpoint(args: PosteriorConfig) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` asks for: a folder, or `true` for the last in `output_dir`.

    Raises:
        ValueError: there is none; one sentence.
    """
    wanted = os.path.expanduser(str(args.resume_from_checkpoint))
    if wanted.lower() in ("none", "false"):
        return None
    if wanted.lower() == "true":
        found = last_whole_checkpoint(os.path.expanduser(str(args.output_dir)))
        if found is None:
            raise ValueError(
                f"There is no checkpoint in `output_dir={args.output_dir}`: leave out `resume_from_checkpoint`."
            )
        return found
    if not (Path(wanted) / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"`resume_from_checkpoint={wanted}` is not a checkpoint: it has no {TRAINER_STATE_NAME}.")
    return wanted


def _check_posterior_state(checkpoint: Path, trainer_class: type[PosteriorTrainer], args: PosteriorConfig) -> None:
    """What the trainer itself refuses when it resumes, said before any model is loaded."""
    if state_file(checkpoint, 0).is_file():
        state = torch.load(state_file(checkpoint, 0), weights_only=True)
        check_same_run(state, run_identity(trainer_class, build_target(args.target, args.beta or None), args))


# ---------------------------------------------------------------------------------------------------------------------
# Data, model and trainer


def make_trainer(trainer_class: type[PosteriorTrainer], arguments: Arguments) -> PosteriorTrainer:
    """
    The trainer; rewards, data and the existence of models are checked before any model is loaded.

    Raises:
        ValueError: one sentence.
        ImportError: an optional package that the configuration needs is not installed.
    """
    script, training, model, _ = arguments
    if model.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing: name the model to train, by id or folder.")
    rewards, _ = find_rewards(script)
    if not rewards:
        raise ValueError("`reward_funcs` is missing: name at least one reward function or reward model.")
    check_extras(model, training)
    settings = loading_arguments(model, training)
    _check_models(model_path(model.model_name_or_path), settings, training)
    check_reward_models(rewards, arguments)
    check_trackers(training)
    train_dataset, eval_dataset = splits_of(load_data(script, arguments.mixture), arguments, rewards)
    if training.prior_samples_dir is not None:
        training.prior_samples_dir = os.path.expanduser(training.prior_samples_dir)
    training.model_init_kwargs = settings
    policy = _policy(model_path(model.model_name_or_path), arguments, rewards)
    return trainer_class(
        reward_funcs=rewards,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model),
        **policy,
    )


def splits_of(dataset: Any, arguments: Arguments, rewards: Sequence[Any]) -> tuple[Any, Any]:
    """
    What is trained on and, if anything, evaluated on.

    Raises:
        ValueError: a split is missing, the prompts do not fill a generation, or a reward needs another column.
    """
    script, training, _, _ = arguments
    train_dataset = select_split(dataset, script.dataset_train_split, script)
    refuse_too_few_prompts(train_dataset, training)
    check_reward_arguments(rewards, ["prompt"] if training.remove_unused_columns else train_dataset.column_names)
    evaluates = training.eval_strategy != "no"
    return train_dataset, select_split(dataset, script.dataset_test_split, script) if evaluates else None


def _check_models(policy: str, settings: dict[str, Any], training: PosteriorConfig) -> None:
    """Refuses models that are not there; writes out where the prior is."""
    trust, revision = training.trust_remote_code, settings["revision"]
    if training.prior_model_name_or_path is not None:
        training.prior_model_name_or_path = model_path(training.prior_model_name_or_path)
        find_config("prior_model_name_or_path", training.prior_model_name_or_path, trust)
    find_config("model_name_or_path", policy, trust, revision)


def _policy(name: str, arguments: Arguments, rewards: Sequence[Any]) -> dict[str, Any]:
    """What a trainer is given to train on: a name that it loads itself, or an adapter, which it could not."""
    training = arguments.training
    quantization_config = get_quantization_config(arguments.model)
    settings = cast("dict[str, Any]", training.model_init_kwargs)
    if base_of_adapter(name, settings["revision"]) is None:
        return {"model": name, "quantization_config": quantization_config}
    if training.prior_model_name_or_path is None and not any(isinstance(reward, str) for reward in rewards):
        training.model_init_kwargs = None  # TRL would warn that they are ignored, and there is no model left to load
    is_replicated = training.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED")  # as TRL has it
    return {
        "model": load_trainable_adapter(
            name, settings | ({"device_map": None} if is_replicated else {}), quantization_config
        ),
        "processing_class": load_tokenizer(name, settings),
    }


def check_trackers(args: PosteriorConfig) -> None:
    """
    Refuses `report_to` with what is not there.

    Raises:
        ValueError: one sentence.
    """
    missing = sorted({*cast("list[str]", args.report_to)} - {*get_available_reporting_integrations()})
    if missing:
        raise ValueError(
            f"`report_to` names {missing}, not installed or unknown: `pip install {' '.join(missing)}`, or set "
            "`report_to` to `none` or one of those that are installed."
        )


# ---------------------------------------------------------------------------------------------------------------------
# The run


def train(trainer: PosteriorTrainer, arguments: Arguments, checkpoint: str | None) -> None:
    """Trains, then saves the model, its tokenizer, the log and the model card, and pushes them if asked to."""
    args = arguments.training
    if checkpoint is None and trainer.is_world_process_zero():
        for old in Path(str(args.output_dir)).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(old)  # a later resume could pick one of another run
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    dataset_name = hub_dataset(arguments.script.dataset_name)
    trainer.create_model_card(model_name=Path(str(args.output_dir)).name, dataset_name=dataset_name)
    trainer.accelerator.print(f"The model is in {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"It is on the Hub as {trainer.hub_model_id}.")
    # gloo's threads free their last tensors under the GIL, which the destructor of the process group would hold
    trainer.accelerator.wait_for_everyone()
    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()
