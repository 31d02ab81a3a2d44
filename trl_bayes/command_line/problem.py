"""What `sample` and `evaluate` share: a posterior, written as for training and loaded without a trainer."""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file
from trl import DatasetMixtureConfig, ModelConfig

from ..assets import embedded_path
from ..rewards import build_rewards
from ..samplers.base import at_least
from ..targets import Target, build_target
from ..trainers.ctrl import CTRLConfig
from ..trainers.dpg import DPGConfig
from ..trainers.f_dpg import FDPGConfig
from ..trainers.kl_rl import KLRLConfig
from ..trainers.trajectory_balance import TrajectoryBalanceConfig
from .launch import ACCELERATE_CONFIG, launcher_actions
from .parser import RecipeParser
from .training import (
    Arguments,
    TrainingScriptArguments,
    check_model,
    first_sentence,
    from_json,
    load_data,
    read_command_line,
    select_split,
)


_TRAINING_CONFIGS = (KLRLConfig, DPGConfig, FDPGConfig, TrajectoryBalanceConfig, CTRLConfig)
_OF_CTRL = ("inference_procedure", "inference_n", "transform_rate", "kl_budget")
# Keys of a training recipe that change prior or prompts, and that only a trainer reads
_ONLY_TRAINERS_READ = ("generation_kwargs", "chat_template_kwargs", "model_init_kwargs")
# Where a training writes is not where its posterior's samples belong
_OF_THE_RUN = ("output_dir", "overwrite")


@dataclass
class PosteriorArguments(TrainingScriptArguments):
    r"""
    A posterior and the prompts to study it on, by the names of a training recipe.

    This class includes only the parameters that are not in
    [`~trl_bayes.command_line.training.TrainingScriptArguments`].

    Parameters:
        prior_model_name_or_path (`str`, *optional*):
            The prior. Defaults to `model_name_or_path`, the model that training starts from.
        target (`str` or `dict[str, Any]`, *optional*):
            As in training. Defaults to `tilt` with `beta`.
        beta (`float`, *optional*, defaults to `0.1`):
            Temperature of the posterior.
        reward_weights (`list[float]`, *optional*):
            One for each reward function. Defaults to ones.
        max_prompts (`int`, *optional*):
            Takes only so many prompts, from the beginning.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Completions are cut after so many tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature of all models.
        batch_size (`int`, *optional*, defaults to `256`):
            Completions generated at once.
        seed (`int`, *optional*, defaults to `0`):
            The same seed and batch size give the same samples.
        device (`str`, *optional*):
            Such as `cuda:0` or `cpu`. Defaults to a GPU if there is one.
        prior_samples_dir (`str`, *optional*):
            Folder in which samples of the prior are kept and found, those of a training run too. Defaults to the one
            that the training of the recipe has filled; where it has none, nothing is kept.
        output_dir (`str`, *optional*):
            Where the results are written.
    """

    prior_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The prior. Defaults to model_name_or_path, the model that training starts from."},
    )
    target: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "The posterior: a name (constraint, tilt, ...), in YAML a mapping with `name` and the target's "
            "arguments, or the dotted path of a Target class. Defaults to 'tilt'."
        },
    )
    beta: float = field(default=0.1, metadata={"help": "Temperature of the posterior, in units of reward per nat."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One for each reward function. Defaults to ones."}
    )
    max_prompts: int | None = field(
        default=None, metadata={"help": "Take only so many prompts, from the beginning of the data."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Completions are cut after so many tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of all models."})
    batch_size: int = field(default=256, metadata={"help": "Completions generated at once."})
    seed: int = field(default=0, metadata={"help": "The same seed and batch size give the same samples."})
    device: str | None = field(
        default=None, metadata={"help": "Such as cuda:0 or cpu. Defaults to a GPU if there is one."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    prior_samples_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which samples of the prior are kept and found, those of a training run too. Defaults "
            "to the one that the training of the recipe has filled."
        },
    )
    output_dir: str = field(default="runs/posterior", metadata={"help": "Where the results are written."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the results in an output_dir that has some."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target = from_json(self.target) if isinstance(self.target, str) else self.target
        if self.max_prompts is not None:
            at_least("max_prompts", self.max_prompts)
        at_least("max_completion_length", self.max_completion_length)
        at_least("batch_size", self.batch_size)
        at_least("seed", self.seed, 0)
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be positive and finite, got {self.temperature}.")


class Problem(NamedTuple):
    """A prior, its evidence, and prompts."""

    prior_name: str
    prior: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rewards: list[Any]
    target: Target
    reward_weights: torch.Tensor | None
    rows: list[dict[str, Any]]
    num_rows: int | None  # of the data, of which `rows` may be the beginning

    @property
    def prompts(self) -> list[Any]:
        """One of each row."""
        return [row["prompt"] for row in self.rows]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """What reward functions are given besides."""
        names = [
            name for name in self.rows[0] if name not in ("prompt", "completion", "completions", "completion_ids")
        ]
        return {name: [row[name] for row in self.rows] for name in names}

    @property
    def reward_names(self) -> list[str]:
        """Of the reward functions."""
        return [getattr(function, "__name__", repr(function)) for function in self.rewards]


Own = TypeVar("Own", bound=PosteriorArguments)


# ---------------------------------------------------------------------------------------------------------------------
# From the command line to arguments


def read_arguments(
    parser: RecipeParser, argv: Sequence[str], arguments_class: type[Own]
) -> tuple[Own, ModelConfig, DatasetMixtureConfig]:
    """
    The arguments as objects; a recipe may be one of a training command, of which only the posterior is read.

    Args:
        parser ([`RecipeParser`]): of the given class, [`~trl.ModelConfig`] and [`~trl.DatasetMixtureConfig`].
        argv (`Sequence[str]`): what stands behind the command.
        arguments_class (`type`): of the command's own arguments.

    Raises:
        ValueError: one sentence.
    """

    def adapt(recipe: dict[str, Any]) -> dict[str, Any]:
        return without_training(recipe, known=parser.fields.keys())

    launcher_flags, own_args = read_command_line(parser, list(argv), adapt)
    if launcher_flags:
        raise ValueError(f"`{launcher_flags[0]}` is for training in several processes: leave it out, this is one.")
    try:
        args, model, mixture, *_ = parser.parse_args_into_dataclasses(own_args)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.doc!r} is not JSON: {error.msg} at character {error.pos + 1}.") from None
    except TypeError as error:  # an unknown entry of one of `datasets`
        raise ValueError(f"A value is not as its field wants it: {error}.") from None
    return args, model, mixture


def without_training(recipe: Mapping[str, Any], known: Sequence[str] | Any) -> dict[str, Any]:
    """
    A recipe without what only concerns training; entries that no command knows stay, to be refused.

    Args:
        recipe (`Mapping`): of a training command, or of another.
        known: names of the command's own fields.

    Raises:
        ValueError: an entry that changes prior or prompts, and that only a trainer reads; one sentence.
    """
    of_training = {name for config in _TRAINING_CONFIGS for name in config.__dataclass_fields__}
    of_training |= {*launcher_actions(), ACCELERATE_CONFIG}
    passed_over = (recipe.keys() & of_training) - set(known)
    if not passed_over:
        return dict(recipe)
    for name in _ONLY_TRAINERS_READ:
        if recipe.get(name) and name in passed_over:
            raise ValueError(f"`{name}` changes the prior or its prompts, and only a trainer reads it: leave it out.")
    own = {name: value for name, value in recipe.items() if name not in {*passed_over, *_OF_THE_RUN}}
    if passed_over & {*_OF_CTRL}:
        own["target"] = _ctrl_target(recipe)
        own.pop("beta", None)  # the target has it
    return _with_kept_samples(own, recipe)


def _with_kept_samples(own: dict[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """With the folder that a training has filled with samples of the prior, which are known by its seed."""
    if "prior_samples_dir" not in own and "output_dir" in recipe:
        kept = Path(str(recipe["output_dir"])).expanduser() / "prior_samples"
        own |= {"prior_samples_dir": str(kept)} if kept.is_dir() else {}
    if own.get("prior_samples_dir") is not None:
        own.setdefault("seed", KLRLConfig.__dataclass_fields__["seed"].default)
    return own


def _ctrl_target(recipe: Mapping[str, Any]) -> Any:
    """The target that CTRL's configuration stands for."""
    settings = {name: recipe[name] for name in (*_OF_CTRL, "beta", "target") if name in recipe}
    return CTRLConfig(**settings, bf16=False, report_to="none").target


def prepare_folder(args: PosteriorArguments) -> Path:
    """
    Makes sure that results can be written, and are not written over others.

    Raises:
        ValueError: one sentence.
    """
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        in_use = any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"`output_dir={folder}` cannot be written to: {error.strerror or error}.") from None
    if in_use and not args.overwrite:
        raise ValueError(f"`output_dir={folder}` is not empty: name another folder, or set `--overwrite`.")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Rewards, data and models


def prior_name(args: PosteriorArguments, model: ModelConfig) -> str:
    """
    The prior's id or folder, checked to be there.

    Raises:
        ValueError: none is named, or there is no such model; one sentence.
    """
    named = args.prior_model_name_or_path or model.model_name_or_path
    if named is None:
        raise ValueError("`model_name_or_path` is missing: name the prior, by id or folder.")
    name = embedded_path(named)
    is_model = args.prior_model_name_or_path is None
    check_model(
        "model_name_or_path" if is_model else "prior_model_name_or_path",
        name,
        args.trust_remote_code,
        model.model_revision if is_model else "main",
    )
    return name


def load_problem(args: PosteriorArguments, model: ModelConfig, mixture: DatasetMixtureConfig) -> Problem:
    """
    The posterior and its prompts; rewards, target and data are checked before the prior is loaded.

    Raises:
        ValueError: one sentence.
        ImportError: an optional package that the configuration needs is not installed.
    """
    name, rewards = prior_name(args, model), _reward_functions(args)
    target = build_target(args.target, args.beta)
    weights = None if args.reward_weights is None else torch.tensor(args.reward_weights)
    _check_evidence(target, rewards, weights)
    rows, num_rows = _rows(args, model, mixture)
    revision = "main" if args.prior_model_name_or_path else model.model_revision
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    prior = load_model(name, args, model, revision)
    return Problem(name, prior, tokenizer, rewards, target, weights, rows, num_rows)


def _reward_functions(args: PosteriorArguments) -> list[Any]:
    rewards = [name for name in [args.reward_model_name_or_path] if name] + build_rewards(args.reward_funcs)
    for reward in rewards:
        if isinstance(reward, str):
            raise ValueError(
                f"`reward_funcs` names the reward model {reward!r}, which only a trainer loads: give a function, for "
                "instance {name: classified_as, ...}."
            )
    return rewards


def _check_evidence(target: Target, rewards: Sequence[Any], weights: torch.Tensor | None) -> None:
    if not rewards and target.reads_rewards:
        raise ValueError(f"The target {target!r} reads rewards: give at least one reward function.")
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(
            f"There are {len(weights)} reward weights for {len(rewards)} reward functions: give one for each."
        )
    target.bind([getattr(f, "__name__", f"reward_{k}") for k, f in enumerate(rewards)], weights)


def _rows(
    args: PosteriorArguments, model: ModelConfig, mixture: DatasetMixtureConfig
) -> tuple[list[dict[str, Any]], int | None]:
    if args.dataset_streaming and args.max_prompts is None:
        raise ValueError("A data set that is streamed may have no end: set `max_prompts`.")
    data = load_data(Arguments(args, cast(Any, None), model, mixture))
    split = select_split(data, args.dataset_train_split, args)
    rows = list(islice(split, args.max_prompts))
    if not rows:
        raise ValueError(f"The data's split {args.dataset_train_split!r} has no rows.")
    return rows, None if args.dataset_streaming else len(split)


def load_model(name: str, args: PosteriorArguments, model: ModelConfig, revision: str = "main") -> PreTrainedModel:
    """
    A model in eval mode on the device; of an adapter, its base model with it.

    Raises:
        ValueError: the device cannot be used; one sentence.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    try:
        return cast(Any, loaded).to(device).eval()
    except RuntimeError as error:
        raise ValueError(f"`device={device}` cannot be used: {str(error).splitlines()[0].rstrip('.')}.") from None


def model_config(field_name: str, name: str, trust_remote_code: bool) -> Any:
    """
    The configuration of a model, or of the base model of an adapter.

    Raises:
        ValueError: there is no such model; one sentence.
        ImportError: it is an adapter, and peft is not installed.
    """
    try:
        adapter = find_adapter_config_file(name)
        if adapter is None:
            return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        message = f"`{field_name}`: the model {name!r} cannot be loaded ({first_sentence(error)})."
        raise ValueError(message) from None
    _require_peft(name)
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{field_name}`: the base model {base!r} of the adapter {name!r} cannot be loaded "
            f"({first_sentence(error)})."
        ) from None


def _require_peft(name: str) -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ImportError(f"{name!r} is an adapter, which needs the package peft: install it.") from None


def progress() -> bool:
    """Whether there is someone to show a progress bar to."""
    return sys.stderr.isatty()
