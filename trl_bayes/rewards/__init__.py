"""Ready evidence: reward functions in TRL's format, to be used as rewards, constraints or features.

They know nothing of targets and trainers. What needs a package of its own (jsonschema, VADER's lexicon) imports it
when it is made.
"""

from trl_bayes.rewards.build import build_reward, build_rewards
from trl_bayes.rewards.classifier import classified_as
from trl_bayes.rewards.contains import contains_word, more_of
from trl_bayes.rewards.json_schema import valid_json
from trl_bayes.rewards.length import length_between, length_in
from trl_bayes.rewards.lexicon import vader_sentiment
from trl_bayes.rewards.maths import gsm8k_accuracy
from trl_bayes.rewards.python_syntax import contains_name, max_length, no_syntax_warning, parses
from trl_bayes.rewards.regex import matches


__all__ = [
    "build_reward",
    "build_rewards",
    "classified_as",
    "contains_name",
    "contains_word",
    "gsm8k_accuracy",
    "length_between",
    "length_in",
    "matches",
    "max_length",
    "more_of",
    "no_syntax_warning",
    "parses",
    "vader_sentiment",
    "valid_json",
]
