"""The rewards of a recipe."""

import os
from typing import Any

from ..rewards import build_rewards
from ..rewards.calling import reward_names
from .arguments import TrainingScriptArguments


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
