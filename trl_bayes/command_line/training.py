"""What all training commands share: from a recipe and flags to a trained, saved and described model."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from packaging.version import Version
from transformers import AutoConfig
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from ..assets import EMBEDDED, embedded_path
from ..prior import PriorSamplesError
from ..rewards import build_rewards
from ..targets import build_target
from ..trainers.posterior_config import PosteriorConfig
from ..trainers.posterior_trainer import PosteriorTrainer
from .launch import (
    ACCELERATE_CONFIG,
    already_launched,
    launch,
    launcher_actions,
    launcher_flags_from_recipe,
    split_launcher_flags,
)
from .parser import RecipeParser, nearest, read_recipe
from .prompts import with_prompts


_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_PROMPTS = "prompts.jsonl"  # beside an embedded model


@dataclass
class TrainingScriptArguments(ScriptArguments):
    r"""
    Arguments of a training command that concern neither the trainer nor the model.

    This class includes only the parameters that are not in [`~trl.ScriptArguments`].

    Parameters:
        reward_model_name_or_path (`str`, *optional*):
            Id or folder of a reward model, used besides `reward_funcs`.
        reward_funcs (`list[str]`, *optional*):
            Reward functions, as [`~trl_bayes.rewards.build_reward`] reads them.
        prompt_template (`str`, *optional*):
            The prompt as a text with columns of the data in braces, for data without a column `prompt`:
            `"{question}"`, `"{prompt[text]}"`. Doubled braces are literal.
        prompt_words (`int`, *optional*):
            Number of words to keep of each prompt, from its beginning.
        prompt_as_message (`bool`, *optional*, defaults to `False`):
            Whether the prompt becomes a user's message, for chat models.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to train into an `output_dir` that is not empty. Checkpoints in it are removed; other files stay
            until they are written anew.
    """

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Id or folder of a reward model, used besides `reward_funcs`."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: names (parses, accuracy_reward, ...), dotted paths, or ids and folders of "
            "reward models. With arguments, in YAML: `{name: max_length, characters: 40}`, as JSON as a flag."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "The prompt as a text with columns of the data in braces, for data without a column `prompt`: "
            "'{question}', '{prompt[text]}'. Doubled braces are literal."
        },
    )
    prompt_words: int | None = field(
        default=None, metadata={"help": "Number of words to keep of each prompt, from its beginning."}
    )
    prompt_as_message: bool = field(
        default=False, metadata={"help": "Whether the prompt becomes a user's message, for chat models."}
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Train into an `output_dir` that is not empty: its checkpoints are removed, other files stay "
            "until they are written anew."
        },
    )

    def __post_init__(self) -> None:
        specs = cast("list[Any]", self.reward_funcs or [])
        self.reward_funcs = [from_json(spec) if isinstance(spec, str) else spec for spec in specs]


class Arguments(NamedTuple):
    """All that a training command was given."""

    script: TrainingScriptArguments
    training: PosteriorConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig


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
    parser = make_parser(name, trainer_class, description)
    try:
        launcher_flags, own_args = read_command_line(parser, argv)
        if launcher_flags and not already_launched():
            return launch(f"trl_bayes.commands.{name.replace('-', '_')}", launcher_flags, own_args)
        arguments = make_arguments(parser, own_args)
        checkpoint = prepare_output_dir(trainer_class, arguments)
        trainer = make_trainer(trainer_class, arguments)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error) or type(error).__name__)
    try:
        train(trainer, arguments, checkpoint)
    except PriorSamplesError as error:  # it turns out only now; other errors keep their traceback
        parser.error(str(error))


# ---------------------------------------------------------------------------------------------------------------------
# From the command line to arguments


def make_parser(name: str, trainer_class: type[PosteriorTrainer], description: str | None = None) -> RecipeParser:
    """The parser of a training command: its own arguments, the trainer's, the model's and the data's."""
    return RecipeParser(
        [TrainingScriptArguments, trainer_class.config_class, ModelConfig, DatasetMixtureConfig],
        prog=f"trl-bayes {name}",
        usage=f"trl-bayes {name} [--config RECIPE] [--FIELD VALUE ...] [--accelerate_config NAME_OR_PATH]",
        description=description,
        epilog="In a recipe, `env` is a mapping of environment variables, and `datasets` a list of data sets to mix.",
    )


def read_command_line(
    parser: RecipeParser, argv: Sequence[str], adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> tuple[list[str], list[str]]:
    """
    Reads the recipe, if there is one, into the parser, and refuses all that is unknown, there and on the command line.

    Args:
        parser ([`RecipeParser`]): of the command.
        argv (`Sequence[str]`): what stands behind it.
        adapt (`Callable`, *optional*): makes a recipe for this command from one that may be for another.

    Returns:
        `tuple[list[str], list[str]]`: options of the launcher, from both, and the training command's own arguments.

    Raises:
        ValueError: an unknown flag or key, or a value of the wrong type; one sentence.
    """
    own_args, launcher_flags = split_launcher_flags(argv, parser.flags - {f"--{ACCELERATE_CONFIG}"})
    namespace, unknown = parser.parse_known_args(own_args)
    if unknown:
        known = parser.flags | {f"--{name}" for name in launcher_actions()}
        flag = next((token for token in unknown if token.startswith("-")), unknown[0])
        raise ValueError(f"Unknown argument `{flag}`{nearest(flag.partition('=')[0], known)}: see --help.")
    if namespace.config is None:
        return launcher_flags, own_args
    recipe = read_recipe(namespace.config)
    recipe = recipe if adapt is None else adapt(recipe)
    others = parser.unknown_keys(recipe)
    for key in others:
        known_keys = {*parser.fields, *launcher_actions(), ACCELERATE_CONFIG, "env"}
        if key not in known_keys:
            raise ValueError(f"Unknown key `{key}` in {namespace.config}{nearest(key, known_keys)}: see --help.")
    parser.use_recipe(recipe, namespace.config)
    return launcher_flags_from_recipe(others) + launcher_flags, own_args


def make_arguments(parser: RecipeParser, own_args: Sequence[str]) -> Arguments:
    """
    The arguments as objects, each of which checks itself.

    Raises:
        ValueError: one sentence.
    """
    try:
        script, training, model, mixture, *_ = parser.parse_args_into_dataclasses(list(own_args))
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.doc!r} is not JSON: {error.msg} at character {error.pos + 1}.") from None
    except TypeError as error:  # an unknown entry of one of `datasets`
        raise ValueError(f"A value is not as its field wants it: {error}.") from None
    return Arguments(script, training, model, mixture)


def from_json(text: str) -> Any:
    """A mapping that stands on the command line as JSON; any other text as it is."""
    return json.loads(text) if text.startswith("{") else text


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
    folder = Path(str(args.output_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        in_use = any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"`output_dir={folder}` cannot be written to: {error.strerror or error}.") from None
    if in_use and checkpoint is None and not arguments.script.overwrite:
        raise ValueError(
            f"`output_dir={folder}` is not empty: name another folder, or set `--overwrite`, or "
            "`--resume_from_checkpoint true` to go on from the last checkpoint in it."
        )
    return checkpoint


def find_checkpoint(args: PosteriorConfig) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` asks for: a folder, or `true` for the last in `output_dir`.

    Raises:
        ValueError: there is none; one sentence.
    """
    wanted = str(args.resume_from_checkpoint)
    if wanted.lower() in ("none", "false"):
        return None
    if wanted.lower() == "true":
        found = get_last_checkpoint(args.output_dir) if os.path.isdir(str(args.output_dir)) else None
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
    file = checkpoint / "posterior_state_0.pt"
    if not file.is_file():
        return
    state = torch.load(file, weights_only=True)
    target = build_target(args.target, args.beta or None)
    for key, ours in (("trainer", trainer_class.__name__), ("target_settings", repr(target))):
        if state[key] != ours:
            raise ValueError(
                f"The checkpoint {checkpoint} was written by a run with {state[key]}, this one has {ours}: resume "
                "with the same trainer and target, or start a new run from the checkpoint's weights."
            )


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
    rewards = [name for name in [script.reward_model_name_or_path] if name] + build_rewards(script.reward_funcs)
    if not rewards:
        raise ValueError("`reward_funcs` is missing: name at least one reward function or reward model.")
    policy = embedded_path(model.model_name_or_path)
    if training.prior_model_name_or_path is not None:
        training.prior_model_name_or_path = embedded_path(training.prior_model_name_or_path)
        check_model("prior_model_name_or_path", training.prior_model_name_or_path, training.trust_remote_code)
    check_model("model_name_or_path", policy, training.trust_remote_code, model.model_revision)
    for name in rewards:
        if isinstance(name, str):
            check_model("reward_funcs", name, training.trust_remote_code)
    _check_trackers(training)
    dataset = load_data(arguments)
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": training.trust_remote_code,
    } | cast("dict[str, Any]", training.model_init_kwargs or {})
    return trainer_class(
        model=policy,
        reward_funcs=rewards,
        args=training,
        train_dataset=select_split(dataset, script.dataset_train_split, script),
        eval_dataset=None
        if training.eval_strategy == "no"
        else select_split(dataset, script.dataset_test_split, script),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def check_model(field_name: str, name: str, trust_remote_code: bool, revision: str = "main") -> None:
    """Refuses a model that is not there; reads its configuration only."""
    try:
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"`{field_name}`: the model {name!r} cannot be loaded ({first_sentence(error)}).") from None


def _check_trackers(args: PosteriorConfig) -> None:
    missing = sorted({*cast("list[str]", args.report_to)} - {*get_available_reporting_integrations()})
    if missing:
        raise ValueError(f"`report_to` names {missing}, not installed or unknown: install it, or set another.")


def load_data(arguments: Arguments) -> DatasetDict | IterableDatasetDict:
    """
    The data sets by split: an id, a local file or folder, the prompts of an embedded model, or a mixture.

    Raises:
        ValueError: none is named, or it cannot be loaded; one sentence.
    """
    script, mixture = arguments.script, arguments.mixture
    name = script.dataset_name
    if mixture.datasets:
        name = ", ".join(part.path for part in mixture.datasets)
        if script.dataset_name:
            raise ValueError("The data is given twice, as `dataset_name` and as `datasets`: leave one of them out.")
    elif name is None:
        raise ValueError("`dataset_name` is missing: name a data set with a column `prompt`, by id, file or folder.")
    try:
        return get_dataset(mixture) if mixture.datasets else _load_named(script)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"The data set {name!r} cannot be loaded ({first_sentence(error)}).") from None


def _load_named(script: TrainingScriptArguments) -> Any:
    name = embedded_path(str(script.dataset_name), _PROMPTS)
    file_format = _FORMATS.get(Path(name).suffix)
    settings = {"name": script.dataset_config, "streaming": script.dataset_streaming}
    if file_format is None:
        return load_dataset(name, **settings)
    if not Path(name).is_file():
        raise FileNotFoundError("no such file")
    return load_dataset(file_format, data_files=name, **settings)


def select_split(dataset: Any, split: str, script: TrainingScriptArguments) -> Any:
    """
    One split of the data, checked to have prompts.

    Raises:
        ValueError: there is no such split, or no column `prompt`, or no row in it; one sentence.
    """
    if split not in dataset:
        raise ValueError(f"The data has no split {split!r}{nearest(split, dataset)}: it has {list(dataset)}.")
    rows = with_prompts(dataset[split], script.prompt_template, script.prompt_words, script.prompt_as_message)
    columns = rows.column_names
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"The data's split {split!r} has no column 'prompt': it has {columns}; see `prompt_template`."
        )
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise ValueError(f"The data's split {split!r} has no rows.")
    return rows


def first_sentence(error: BaseException) -> str:
    """The first line of an error's message, to be put in brackets."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:")


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


def hub_dataset(name: str | None) -> str | None:
    """The name of a data set if it is one on the Hub, which is what a model card can link to."""
    if name is None or name.startswith(EMBEDDED) or os.path.exists(name) or Path(name).suffix in _FORMATS:
        return None
    return name
