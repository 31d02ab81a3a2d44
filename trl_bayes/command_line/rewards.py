"""The rewards of a recipe: functions, and models that a trainer loads itself and a study as a trainer does."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from ..language_models.adapters import base_of_adapter
from ..rewards import build_rewards
from ..rewards.calling import refuse_other_heads, reward_name, reward_names
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
            refuse_other_heads(config, reward_name(name))
            classifies = any(head.endswith("ForSequenceClassification") for head in config.architectures or [])
            if classifies and (labels := config.num_labels) != 1:
                raise ValueError(
                    f"The reward model {name!r} has {labels} labels and a reward is one number: use the reward "
                    "`classified_as`, which takes the probability of a label."
                )


def load_reward_models(rewards: Sequence[Any], arguments: Arguments, device: torch.device) -> list[Any]:
    """The rewards as functions, each model loaded as a trainer loads it."""
    settings = loading_arguments(arguments.model, arguments.training)
    template: Any = arguments.training.chat_template_kwargs
    return [
        RewardModel(reward, settings, template, device) if isinstance(reward, str) else reward for reward in rewards
    ]
