"""What `sample` and `evaluate` share: a posterior, written as for training and loaded without a trainer."""

from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..language_models.generation import find_stop_ids
from ..language_models.prompts import check_prompts
from ..language_models.settings import SamplingSettings
from ..rewards.calling import NOT_PASSED_ON, check_reward_arguments
from ..targets import Target, build_target
from ..trainers.posterior_config import PosteriorConfig
from ..trainers.preference_trainer import MissingEOS
from ..trainers.xpo_config import XPOConfig
from .arguments import Arguments, StudyArguments
from .data import load_data, select_split
from .models import choose_device, find_config, load_model, load_tokenizer, loading_arguments, model_path
from .rewards import check_reward_models, find_rewards, load_reward_models


class Study(NamedTuple):
    """A prior, its evidence, and prompts."""

    named: str  # the prior, as the user names it
    prior: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rewards: list[Any]
    reward_names: list[str]
    target: Target
    reward_weights: torch.Tensor | None
    rows: list[dict[str, Any]]
    num_rows: int | None  # of the data, of which `rows` may be the beginning
    settings: SamplingSettings  # how completions are drawn, of all models
    prior_path: str
    prior_samples_dir: str | None  # that of a training, with what it has kept
    training_seed: int  # by which kept samples are known

    @property
    def prompts(self) -> list[Any]:
        """One of each row."""
        return [row["prompt"] for row in self.rows]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """What reward functions are given besides."""
        names = [name for name in self.rows[0] if name not in NOT_PASSED_ON]
        return {name: [row[name] for row in self.rows] for name in names}

    @property
    def settings_of_prior(self) -> SamplingSettings:
        """How the prior is sampled: where samples are kept, as training does."""
        return self.settings if self.prior_samples_dir is None else replace(self.settings, seed=self.training_seed)


def load_study(args: StudyArguments, arguments: Arguments) -> Study:
    """
    The posterior and its prompts; rewards, target and data are checked before the prior is loaded.

    Args:
        args ([`StudyArguments`]): the command's own.
        arguments ([`Arguments`]): of the recipe.

    Raises:
        ValueError: one sentence.
        ImportError: an optional package that the configuration needs is not installed.
    """
    training = arguments.training
    name, revision = find_prior(arguments)
    rewards, names = find_rewards(arguments.script)
    check_reward_models(rewards, arguments)
    target = build_target(training.target, training.beta)
    weights = _weights(training.reward_weights, len(rewards))
    if not rewards and target.reads_rewards:
        raise ValueError(f"The target {target!r} reads rewards: give at least one reward function.")
    penalty = _missing_eos(training)
    if penalty is not None:  # one more reward, as in training
        names, weights = [*names, penalty.__name__], None if weights is None else torch.cat([weights, torch.ones(1)])
    target.bind(names, weights)
    rows, num_rows = _rows(args, arguments)
    check_reward_arguments(rewards, list(rows[0]))
    settings = {**loading_arguments(arguments.model, training), "revision": revision}
    tokenizer = load_tokenizer(name, settings)
    is_policys = training.prior_model_name_or_path is None
    prior = load_model(name, arguments.model, training, args.device, revision=revision, quantized=is_policys)
    rewards = load_reward_models(rewards, arguments, choose_device(args.device, training))
    if penalty is not None:
        penalty.eos_token_ids = find_stop_ids(prior, tokenizer)
        rewards = [*rewards, penalty]
    drawn = _sampling_settings(args, training)
    check_prompts(
        [row["prompt"] for row in rows],
        tokenizer,
        prior,
        max_completion_length=drawn.max_new_tokens,
        chat_template_kwargs=drawn.chat_template_kwargs,
    )
    return Study(
        named=training.prior_model_name_or_path or str(arguments.model.model_name_or_path),
        prior=prior,
        tokenizer=tokenizer,
        rewards=rewards,
        reward_names=names,
        target=target,
        reward_weights=weights,
        rows=rows,
        num_rows=num_rows,
        settings=drawn,
        prior_path=name,
        prior_samples_dir=training.prior_samples_dir,
        training_seed=training.seed,
    )


def _sampling_settings(args: StudyArguments, training: PosteriorConfig) -> SamplingSettings:
    """As in training; what takes long is shown."""
    return SamplingSettings(
        cast(int, training.max_completion_length),  # the configuration's default is a number
        training.temperature,
        args.batch_size,
        args.seed,
        chat_template_kwargs=cast("dict[str, Any]", training.chat_template_kwargs or {}),
        progress=True,
    )


def find_prior(arguments: Arguments) -> tuple[str, str]:
    """
    The prior's id or folder, checked to be there, and its revision.

    Raises:
        ValueError: none is named, or there is no such model; one sentence.
        ImportError: it is an adapter, and peft is not installed.
    """
    model, training = arguments.model, arguments.training
    if training.prior_model_name_or_path is not None:
        field, named, revision = "prior_model_name_or_path", training.prior_model_name_or_path, "main"
    elif model.model_name_or_path is not None:
        field, named = "model_name_or_path", model.model_name_or_path
        revision = loading_arguments(model, training)["revision"]
    else:
        raise ValueError("`model_name_or_path` is missing: name the prior, by id or folder.")
    name = model_path(named)
    find_config(field, name, training.trust_remote_code, revision)
    return name, revision


def _missing_eos(training: PosteriorConfig) -> MissingEOS | None:
    """The penalty of XPO's recipes, which is part of the posterior; tokens that end a completion are not known yet."""
    penalty = training.missing_eos_penalty if isinstance(training, XPOConfig) else None
    return None if penalty is None else MissingEOS(penalty, [])


def _weights(weights: list[float] | None, number: int) -> torch.Tensor | None:
    if weights is not None and len(weights) != number:
        raise ValueError(f"There are {len(weights)} reward weights for {number} reward functions: give one for each.")
    return None if weights is None else torch.tensor(weights)


def _rows(args: StudyArguments, arguments: Arguments) -> tuple[list[dict[str, Any]], int | None]:
    if args.dataset_streaming and args.max_prompts is None:
        raise ValueError("A data set that is streamed may have no end: set `max_prompts`.")
    split = select_split(load_data(arguments.script, arguments.mixture), args.dataset_train_split, args)
    rows = list(islice(split, args.max_prompts))
    if not rows:
        raise ValueError(f"The data's split {args.dataset_train_split!r} has no rows.")
    if arguments.training.remove_unused_columns:  # TRL keeps what generation needs
        rows = [{"prompt": row["prompt"]} for row in rows]
    return rows, None if args.dataset_streaming else len(split)
