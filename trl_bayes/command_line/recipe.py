"""
One reading of a recipe for all commands: the same keys, checked by the same parser, become the same objects.

A training command reads all of it ([`read_training`]). A command that studies a posterior without training reads the
same recipe for the same trainer's configuration ([`read_study`]), so that what is not set has training's default, and
passes over what only concerns the training itself, such as `learning_rate`.
"""

import argparse
import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig

import trl_bayes

from ..spelling import did_you_mean
from ..trainers.posterior_config import PosteriorConfig
from ..trainers.posterior_trainer import PosteriorTrainer
from .arguments import Arguments, StudyArguments, TrainingScriptArguments
from .launch import ACCELERATE_CONFIG, launcher_actions, launcher_flags_from_recipe, split_launcher_flags
from .parser import RecipeParser, read_recipe
from .unknown_keys import unknown_flags, unknown_keys


_STUDIED = (
    "prior_model_name_or_path",
    "target",
    "beta",
    "reward_weights",
    "max_completion_length",
    "temperature",
    "chat_template_kwargs",
    "model_init_kwargs",
    "trust_remote_code",
    "prior_samples_dir",
)
"""Fields of a trainer's configuration that define prior, posterior and prompts: flags of a study too."""

_STUDIED_IN_RECIPES = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "mask_truncated_completions",
    "vllm_structured_outputs_regex",
    "remove_unused_columns",
    "use_cpu",
    "seed",
)
"""Fields of TRL's own that change what is sampled or what rewards are given: refused or followed as in training."""

# Where a training writes is not where its posterior's samples belong
_OF_THE_RUN = ("output_dir", "overwrite")

Own = TypeVar("Own", bound=StudyArguments)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def training_parser(name: str, trainer_class: type[PosteriorTrainer], description: str | None = None) -> RecipeParser:
    """The parser of a training command: its own arguments, the trainer's, the model's and the data's."""
    return RecipeParser(
        [TrainingScriptArguments, trainer_class.config_class, ModelConfig, DatasetMixtureConfig],
        prog=f"trl-bayes {name}",
        usage=f"trl-bayes {name} [--config RECIPE] [--FIELD VALUE ...] [--accelerate_config NAME_OR_PATH]",
        description=description,
        epilog="In a recipe, `env` is a mapping of environment variables, and `datasets` a list of data sets to mix.",
    )


def read_command_line(
    parser: RecipeParser,
    argv: Sequence[str],
    recipe: Mapping[str, Any] | None = None,
    also_known: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """
    Reads the recipe, if there is one, into the parser, and refuses all that is unknown, there and on the command line.

    Args:
        parser ([`RecipeParser`]): of the command.
        argv (`Sequence[str]`): what stands behind it.
        recipe (`Mapping`, *optional*): what `--config` names, if it is read already; or what stands in its place.
        also_known (`list[str]`, *optional*): keys of a recipe that mean something elsewhere, to be passed over.

    Returns:
        `tuple[list[str], list[str]]`: options of the launcher, from both, and the command's own arguments.

    Raises:
        ValueError: an unknown flag or key, or a value of the wrong type; one sentence.
    """
    own_args, launcher_flags = split_launcher_flags(argv, parser.flags - {f"--{ACCELERATE_CONFIG}"})
    namespace, unknown = parser.parse_known_args(own_args)
    if unknown:
        raise ValueError(unknown_flags(unknown, parser.flags | {f"--{name}" for name in launcher_actions()}))
    if recipe is None and namespace.config is None:
        return launcher_flags, own_args
    recipe = read_recipe(namespace.config) if recipe is None else recipe
    source = namespace.config or "the command line"
    of_launcher = {*launcher_actions(), ACCELERATE_CONFIG}
    others = parser.unknown_keys(recipe)
    known = {*parser.fields, *of_launcher, *also_known, "env"}
    if strange := [key for key in others if key not in known]:
        raise ValueError(unknown_keys(strange, known, source))
    parser.use_recipe(recipe, source)
    flags = launcher_flags_from_recipe({key: value for key, value in others.items() if key in of_launcher})
    return flags + launcher_flags, own_args


def make_arguments(parser: RecipeParser, own_args: Sequence[str]) -> Arguments:
    """
    The arguments of a training command as objects, each of which checks itself.

    Raises:
        ValueError: one sentence.
    """
    return Arguments(*_objects(parser, own_args))


def check_trainer(script: TrainingScriptArguments, trainer_class: type[PosteriorTrainer]) -> None:
    """
    Refuses a recipe that says it is for another trainer.

    Raises:
        ValueError: one sentence.
    """
    if script.trainer not in (None, trainer_class.__name__):
        raise ValueError(
            f"`trainer={script.trainer}` says that this is no recipe for {trainer_class.__name__}: use that trainer's "
            "command, or leave `trainer` out."
        )


def _objects(parser: RecipeParser, own_args: Sequence[str]) -> list[Any]:
    try:
        return list(parser.parse_args_into_dataclasses(list(own_args)))[:4]  # then what no dataclass has
    except json.JSONDecodeError as error:
        raise ValueError(_no_json(error)) from None
    except ValueError as error:
        if "bf16/gpu" in str(error):  # the message of transformers names neither flag nor recipe
            raise ValueError(
                "This machine has no accelerator that torch can use in bf16, the default: add `--use_cpu` (`use_cpu: "
                "true` in a recipe) to train on the CPU, or `--bf16 false` on an older GPU."
            ) from None
        raise
    except TypeError as error:  # an unknown entry of one of `datasets`
        raise ValueError(f"A value is not as its field wants it: {error}.") from None


def _no_json(error: json.JSONDecodeError) -> str:
    return f"{error.doc!r} is not JSON: {error.msg} at character {error.pos + 1}."


# ---------------------------------------------------------------------------------------------------------------------
# A posterior without training


def read_study(
    own_class: type[Own],
    command: str,
    argv: Sequence[str],
    *,
    usage: str,
    description: str | None,
    epilog: str | None = None,
) -> tuple[Own, Arguments]:
    """
    The arguments of a command that studies a posterior, from flags and a recipe that may be one of training.

    Args:
        own_class (`type`): of the command's own arguments.
        command (`str`): its name.
        argv (`Sequence[str]`): what stands behind it.
        usage, description, epilog (`str`, *optional*): of its help.

    Returns:
        The command's own arguments, and [`Arguments`] as a training by the same recipe has them, but for what only
        concerns the training.

    Raises:
        ValueError: one sentence.
    """
    file, trainer = _first_look(argv)
    recipe = {} if file is None else read_recipe(file)
    config_class = _config_class(recipe, trainer)
    parser = RecipeParser(
        [own_class, _studied(config_class), ModelConfig, DatasetMixtureConfig],
        prog=f"trl-bayes {command}",
        usage=f"trl-bayes {command} {usage}",
        description=description,
        epilog=epilog,
    )
    of_training = {*_keys_of_trainers(), *launcher_actions(), ACCELERATE_CONFIG}
    passed_over = (recipe.keys() & of_training) - parser.fields.keys()
    not_ours = {*launcher_actions(), ACCELERATE_CONFIG, *(_OF_THE_RUN if passed_over else ())}
    ours = {key: value for key, value in recipe.items() if key not in not_ours}
    launcher_flags, own_args = read_command_line(parser, argv, ours, also_known=of_training)
    if launcher_flags:
        raise ValueError(f"`{launcher_flags[0]}` is for training in several processes: leave it out, this is one.")
    own, studied, model, mixture = _objects(parser, own_args)
    values = _values_of_recipe(config_class, recipe, str(file)) | vars(studied)
    values["prior_samples_dir"] = values["prior_samples_dir"] or _kept_samples(recipe)
    return own, Arguments(own, _training_config(config_class, values), model, mixture)


def trainers() -> dict[str, type[PosteriorTrainer]]:
    """The trainers of this package by their names."""
    return {name: getattr(trl_bayes, name) for name in trl_bayes.__all__ if name.endswith("Trainer")}


def _first_look(argv: Sequence[str]) -> tuple[str | None, str | None]:
    """What must be known before there is a parser: the recipe, and the trainer that it is for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--trainer")
    try:
        found, _ = parser.parse_known_args(list(argv))
    except argparse.ArgumentError:  # without a value: the parser that comes says so
        return None, None
    return found.config, found.trainer


def _keys_of_trainers() -> set[str]:
    return {key for trainer in trainers().values() for key in trainer.config_class.__dataclass_fields__}


def _config_class(recipe: Mapping[str, Any], name: str | None) -> type[PosteriorConfig]:
    """The configuration that a recipe is for: that of the trainer it names, or the plainest that has all its keys."""
    known = trainers()
    name = recipe.get("trainer") if name is None else name
    if name is not None:
        if name not in known:
            raise ValueError(f"There is no trainer {name!r}{did_you_mean(name, known)}: use one of {list(known)}.")
        return known[name].config_class
    classes: set[type[PosteriorConfig]] = {PosteriorConfig, *(each.config_class for each in known.values())}
    keys = recipe.keys() & (_keys_of_trainers() - GRPOConfig.__dataclass_fields__.keys())
    for config_class in sorted(classes, key=lambda each: (len(each.__mro__), each.__name__)):
        if keys <= config_class.__dataclass_fields__.keys():
            return config_class
    raise ValueError(f"No trainer has all of {sorted(keys)}: leave out those that the recipe's trainer does not read.")


def _studied(config_class: type[PosteriorConfig]) -> type:
    """A dataclass with the fields that a study has as flags, each as in the configuration."""
    hints, fields = get_type_hints(config_class), config_class.__dataclass_fields__
    made = dataclasses.make_dataclass(
        config_class.__name__,
        [
            (
                name,
                hints[name],
                dataclasses.field(default=fields[name].default, metadata=dict(fields[name].metadata)),
            )
            for name in _STUDIED
        ],
    )
    made.__module__ = config_class.__module__
    return made


def _values_of_recipe(config_class: type[PosteriorConfig], recipe: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What a recipe says of the posterior that is no flag of a study; all that it says of training is checked."""
    values = RecipeParser([config_class]).values(recipe, source)
    of_trl = GRPOConfig.__dataclass_fields__.keys() - PosteriorConfig.__annotations__.keys()
    return {name: value for name, value in values.items() if name in _STUDIED_IN_RECIPES or name not in of_trl}


def _kept_samples(recipe: Mapping[str, Any]) -> str | None:
    """Where the training of a recipe has kept samples of the prior, if it has."""
    kept = Path(str(recipe.get("output_dir", ""))).expanduser() / "prior_samples"
    return str(kept) if "output_dir" in recipe and kept.is_dir() else None


def _training_config(config_class: type[PosteriorConfig], values: dict[str, Any]) -> PosteriorConfig:
    """
    The configuration of a training by a recipe, as far as a study reads it, on whatever machine this is.

    Raises:
        ValueError: what training refuses too, or what only a trainer reads; one sentence.
    """
    if values["beta"] == 0:
        raise ValueError("`beta=0` is pure RL, which has no posterior: set `beta` > 0.")
    try:
        config = config_class(**values, bf16=False, report_to="none")
    except json.JSONDecodeError as error:
        raise ValueError(_no_json(error)) from None
    if config.generation_kwargs:
        raise ValueError("`generation_kwargs` may change what is sampled, and only a trainer reads it: leave it out.")
    return config
