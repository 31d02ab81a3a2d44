"""Ready evidence: reward functions in TRL's format, to be used as rewards, constraints or features.

They know nothing of targets, trainers or models, and import no more than the standard library.
"""

from trl_bayes.rewards.build import build_reward, build_rewards
from trl_bayes.rewards.python_syntax import contains_name, max_length, no_syntax_warning, parses


__all__ = ["build_reward", "build_rewards", "contains_name", "max_length", "no_syntax_warning", "parses"]
