"""The rewards of a recipe: functions, and models that a trainer loads itself and a study as a trainer does."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from ..language_models.adapters import base_of_adapter
from ..rewards import build_rewards
from ..rewards.calling import reward_name, reward_names
from ..rewards.reward_model import RewardModel
from .arguments import Arguments, TrainingScriptArguments
from .models import find_config, loading_arguments


def find_rewards(script: TrainingScriptArguments) -> tuple[list[Any], list[str]]:
    """
    Reward functions, and ids or folders of reward models, with the names that TRL gives them.

    Raises:
        ValueError: a reward does not exist or cannot be made, or two have the same name; one sentence.
    """
    first = [] if script.reward_model_name_or_path is None else [script.reward_model_name_or_path]
    found = first + build_rewards(script.reward_funcs)
    rewards = [os.path.expanduser(reward) if isinstance(reward, str) else reward for reward in found]
    return rewards, reward_names(rewards)


def check_reward_models(rewards: Sequence[Any], arguments: Arguments) -> None:
    """
    Refuses reward models that are not there, or whose head gives no reward.

    Raises:
        ValueError: one sentence.
    """
    settings = loading_arguments(arguments.model, arguments.training)
    for name in rewards:
        if isinstance(name, str):  # TRL loads it with `model_init_kwargs`, the policy's revision included
            config = find_config("reward_funcs", name, arguments.training.trust_remote_code, settings["revision"])
            if base_of_adapter(name, settings["revision"]) is not None:
                continue  # whose head is its own, and not that of the base's configuration
            _refuse_other_heads(config, name)


def _refuse_other_heads(config: PretrainedConfig, name: str) -> None:
    """A language model, which would get a head of random numbers, and a classifier that gives several of them."""
    heads = config.architectures or []
    if heads and all(head.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")) for head in heads):
        raise ValueError(
            f"The reward {reward_name(name)!r} is a language model ({heads[0]}), whose reward would come from a head "
            "of random weights: name a sequence classifier with one label, or a function."
        )
    if any(head.endswith("ForSequenceClassification") for head in heads) and config.num_labels != 1:
        raise ValueError(
            f"The reward model {name!r} has {config.num_labels} labels and a reward is one number: use the reward "
            "`classified_as`, which takes the probability of a label."
        )


def load_reward_models(rewards: Sequence[Any], arguments: Arguments, device: torch.device) -> list[Any]:
    """The rewards as functions, each model loaded as a trainer loads it."""
    settings = loading_arguments(arguments.model, arguments.training)
    template: Any = arguments.training.chat_template_kwargs
    return [
        RewardModel(reward, settings, template, device) if isinstance(reward, str) else reward for reward in rewards
    ]
