"""The recipe of demonstration-regularized RL: a section for each stage, all of it checked before a model is loaded."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import yaml
from trl import ModelConfig, RewardConfig, SFTConfig

from ..language_models.settings import at_least
from ..spelling import did_you_mean
from ..trainers.posterior_trainer import PosteriorTrainer
from .parser import RecipeParser
from .recipe import trainers, training_parser
from .unknown_keys import unknown_keys


SECTIONS = ("clone", "reward", "rl")
_RULE = ("rule", "epsilon", "expert_entropy")
_SET_BY_US = ("output_dir", "overwrite", "resume_from_checkpoint", "prior_model_name_or_path")


@dataclass
class DemonstrationArguments:
    r"""
    Arguments of `trl-bayes demo-rl`; a section is a mapping in the recipe.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"runs/demonstrations"`):
            Each stage writes into a folder of its own in it, `clone`, `reward` and `rl`.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to do the stages again from the first one whose folder holds another run.
        clone, rl (`dict`):
            The first and the last stage: fields of [`CloneArguments`] and of TRL's `SFTConfig`; and `trainer`, the
            name of one of ours, with the fields of its command.
        reward (`dict`, *optional*):
            The stage between them, if there is one: fields of [`PreferenceArguments`] and of TRL's `RewardConfig`.
    """

    output_dir: str = field(
        default="runs/demonstrations", metadata={"help": "Each stage writes into a folder of its own in it."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Do the stages again from the first one whose folder holds another run."},
    )
    clone: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "First stage: SFTTrainer on demonstrations. Fields of SFTConfig, and `dataset_name`, ..."},
    )
    reward: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Optional second stage: RewardTrainer on preferences over the clone's completions."},
    )
    rl: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Last stage: `trainer`, such as KLRLTrainer, and the fields of its command."},
    )


@dataclass
class CloneArguments:
    r"""
    Fields of the section `clone` that are not in [`~trl.SFTConfig`] or [`~trl.ModelConfig`].

    Parameters:
        dataset_name (`str`):
            The demonstrations: an id, file or folder with columns `prompt` and `completion`, texts or messages.
            Without a column `prompt` all prompts are empty.
        dataset_config (`str`, *optional*), dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Which part of it.
        held_out (`float`, *optional*, defaults to `0.1`):
            Demonstrations that are not cloned, but measure the clone: a share below 1, or a number.
        prior_demonstrations (`int`, *optional*, defaults to `100`):
            The floor: so many completions of the prior are cloned besides, over all prompts.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Tokens of the longest of those; one that is longer is cut there, as in stage 2.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Demonstrations, by id, file or folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Which configuration of it."})
    dataset_train_split: str = field(default="train", metadata={"help": "Which split of it."})
    held_out: float = field(default=0.1, metadata={"help": "Share or number that measures the clone instead."})
    prior_demonstrations: int = field(default=100, metadata={"help": "Completions of the prior, cloned besides."})
    max_completion_length: int = field(default=256, metadata={"help": "Tokens of the longest of those."})

    def __post_init__(self) -> None:
        if not (math.isfinite(self.held_out) and self.held_out >= 0):
            raise ValueError(f"`held_out={self.held_out}` is neither a share nor a number: set 0 or more.")
        at_least("prior_demonstrations", self.prior_demonstrations, 0)
        at_least("max_completion_length", self.max_completion_length)


@dataclass
class PreferenceArguments:
    r"""
    Fields of the section `reward` that are not in [`~trl.RewardConfig`] or [`~trl.ModelConfig`].

    Parameters:
        dataset_name (`str`, *optional*):
            Preferences that are there already: columns `chosen` and `rejected`, and `prompt`.
        dataset_config (`str`, *optional*), dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Which part of it.
        preference_funcs (`list[str]`, *optional*):
            Otherwise, reward functions that say which of two completions of the clone is preferred: the one with the
            larger weighted sum. Two that are worth the same make no pair.
        preference_weights (`list[float]`, *optional*): of the functions; all 1 by default.
        num_pairs (`int`, *optional*, defaults to `1000`): pairs of completions, over all prompts.
        max_completion_length (`int`, *optional*, defaults to `256`): tokens of the longest completion.
        model_name_or_path (`str`, *optional*): what becomes the reward model. Defaults to the clone.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Preferences, by id, file or folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Which configuration of them."})
    dataset_train_split: str = field(default="train", metadata={"help": "Which split of them."})
    preference_funcs: list[str] | None = field(
        default=None, metadata={"help": "Otherwise, what prefers a completion."}
    )
    preference_weights: list[float] | None = field(default=None, metadata={"help": "Weights of those."})
    num_pairs: int = field(default=1000, metadata={"help": "Pairs of the clone's completions, over all prompts."})
    max_completion_length: int = field(default=256, metadata={"help": "Tokens of the longest completion."})

    def __post_init__(self) -> None:
        at_least("num_pairs", self.num_pairs)
        at_least("max_completion_length", self.max_completion_length)
        if (self.dataset_name is None) == (self.preference_funcs is None):
            raise ValueError(
                "The section `reward` needs preferences: either `dataset_name`, or `preference_funcs` to make them of "
                "the clone's completions."
            )
        number = len(self.preference_funcs or [])
        if self.preference_weights is not None and len(self.preference_weights) != number:
            raise ValueError(
                f"There are {len(self.preference_weights)} `preference_weights` for {number} `preference_funcs`: give "
                "one for each."
            )


class BetaRule(NamedTuple):
    """`beta = epsilon / KL(expert||clone)`, with the KL measured on held-out demonstrations."""

    epsilon: float
    expert_entropy: float = 0.0


@dataclass(frozen=True)
class DemonstrationRecipe:
    """The sections of a recipe as they are written, and the trainer and the rule of the last one."""

    arguments: DemonstrationArguments
    sections: Mapping[str, dict[str, Any]]
    source: str
    trainer: type[PosteriorTrainer]
    rule: BetaRule | None

    def clone(self, **settings: Any) -> tuple[CloneArguments, SFTConfig, ModelConfig]:
        """The first stage's objects; `settings` beat the recipe's."""
        parser = RecipeParser([CloneArguments, SFTConfig, ModelConfig], prog="trl-bayes demo-rl")
        return cast(Any, self._objects(parser, "clone", settings))

    def reward(self, **settings: Any) -> tuple[PreferenceArguments, RewardConfig, ModelConfig]:
        """The second stage's objects."""
        parser = RecipeParser([PreferenceArguments, RewardConfig, ModelConfig], prog="trl-bayes demo-rl")
        return cast(Any, self._objects(parser, "reward", settings))

    def rl(self, **settings: Any) -> list[Any]:
        """The last stage's: its script arguments, training configuration, model and mixture of data."""
        parser = training_parser("demo-rl", self.trainer)
        return self._objects(parser, "rl", settings)

    def _objects(self, parser: RecipeParser, name: str, settings: Mapping[str, Any]) -> list[Any]:
        source = f"the section `{name}` of {self.source}"
        section = {key: value for key, value in self.sections[name].items() if key in parser.fields}
        if strange := [key for key in self.sections[name] if key not in parser.fields]:
            raise ValueError(unknown_keys(strange, parser.fields, source))
        parser.use_recipe(section | dict(settings), source)
        return list(parser.parse_args_into_dataclasses([]))[: len(list(parser.dataclass_types))]


def read_demonstration_recipe(arguments: DemonstrationArguments, source: str) -> DemonstrationRecipe:
    """
    Looks at the sections, and finds the trainer and the rule for `beta`.

    Raises:
        ValueError: a section is missing or empty, sets what the command sets, or names no trainer; one sentence.
    """
    sections = {}
    for name in SECTIONS:
        section = getattr(arguments, name)
        if section is None and name == "reward":
            continue
        if section is None:
            raise ValueError(f"The stage `{name}` is missing in {source}: write a section with its settings.")
        if not isinstance(section, Mapping) or not section:
            raise ValueError(f"The stage `{name}` in {source} is empty: give its settings as a mapping.")
        if taken := [key for key in _SET_BY_US if key in section]:
            raise ValueError(
                f"`{taken[0]}` in the section `{name}` of {source} is what the command sets itself: leave it out."
            )
        sections[name] = dict(section)
    if "model_name_or_path" in sections["rl"]:
        raise ValueError(
            f"`model_name_or_path` in the section `rl` of {source} is what the command sets itself, to the clone: "
            "leave it out."
        )
    known, named = trainers(), str(sections["rl"].get("trainer", "KLRLTrainer"))
    if named not in known:
        raise ValueError(f"There is no trainer {named!r}{did_you_mean(named, known)}: use one of {list(known)}.")
    rule = _rule(sections["rl"], source)
    return DemonstrationRecipe(arguments, sections, source, known[named], rule)


def _rule(section: Mapping[str, Any], source: str) -> BetaRule | None:
    """The rule that stands where a number could stand."""
    beta = section.get("beta")
    if not isinstance(beta, Mapping):
        return None
    if strange := [key for key in beta if key not in _RULE]:
        raise ValueError(unknown_keys(strange, _RULE, f"`beta` in the section `rl` of {source}"))
    if beta.get("rule") != "demonstrations" or "epsilon" not in beta:
        raise ValueError(
            f"`beta` in the section `rl` of {source} must be a number, or `{{rule: demonstrations, epsilon: ...}}`, "
            f"but is {dict(beta)}."
        )
    try:
        rule = BetaRule(float(beta["epsilon"]), float(beta.get("expert_entropy", 0.0)))
    except (TypeError, ValueError):
        raise ValueError(
            f"`epsilon` and `expert_entropy` in {source} must be numbers, but `beta` is {dict(beta)}."
        ) from None
    if not (math.isfinite(rule.epsilon) and rule.epsilon > 0):
        raise ValueError(f"`epsilon={rule.epsilon}` in {source} must be a positive amount of reward.")
    if section.get("temperature", 1.0) != 1.0:
        raise ValueError(
            f"The rule for `beta` in {source} measures the clone at temperature 1: leave `temperature` out, or set "
            "`beta` to a number."
        )
    return rule


# ---------------------------------------------------------------------------------------------------------------------
# Flags of a section


def split_section_flags(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str, Any]]]:
    """
    Takes `--SECTION.KEY VALUE` out of a command line.

    Returns:
        The other arguments, and the section, the key and the value of each.

    Raises:
        ValueError: no value, or one that is not YAML; one sentence.
    """
    others: list[str] = []
    found: list[tuple[str, str, Any]] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        match = re.fullmatch(rf"--({'|'.join(SECTIONS)})\.(\w+)(?:=(.*))?", token, re.DOTALL)
        if match is None:
            others.append(token)
            continue
        section, key, value = match.groups()
        if value is None and not tokens:
            raise ValueError(f"`{token}` needs a value.")
        try:
            found.append((section, key, yaml.safe_load(tokens.pop(0) if value is None else value)))
        except yaml.YAMLError:
            raise ValueError(f"The value of `{token}` is not YAML.") from None
    return others, found


def with_section_flags(recipe: Mapping[str, Any], flags: Sequence[tuple[str, str, Any]]) -> dict[str, Any]:
    """A recipe in which some entries of sections are those of the command line."""
    changed = dict(recipe)
    for section, key, value in flags:
        old = changed.get(section)
        changed[section] = {**(old if isinstance(old, Mapping) else {}), key: value}
    return changed
