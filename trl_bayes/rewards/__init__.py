"""Ready evidence: reward functions in TRL's format, to be used as rewards, constraints or features.

They know nothing of targets and trainers. What needs a package of its own (jsonschema, VADER's lexicon) imports it
when it is made.
"""

from .build import build_reward, build_rewards
from .classifier import classified_as
from .contains import contains_word, more_of
from .json_schema import valid_json
from .length import length_between, length_in
from .lexicon import vader_sentiment
from .maths import gsm8k_accuracy
from .python_syntax import contains_name, max_length, no_syntax_warning, parses
from .regex import matches


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
