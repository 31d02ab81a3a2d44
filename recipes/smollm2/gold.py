"""A second judgment of tone, which training does not see: the mean polarity of the words that TextBlob knows.

Whether a policy writes more positively, or has found what its reward likes: see `positive` in the README.
"""

from typing import Any

from trl_bayes.rewards.texts import completion_text


def polarity(completions: list[Any], **kwargs: Any) -> list[float | None]:
    """
    From -1 to 1. A mean over words, unlike VADER's sum: to repeat a positive word does not raise it.

    Raises:
        ImportError: textblob is not installed.
    """
    try:
        from textblob import TextBlob
    except ImportError:
        raise ImportError(
            "The second judgment of the recipe `positive` needs the package textblob: pip install textblob==0.20.1, "
            "or leave `recipes.smollm2.gold.polarity` and its weight out."
        ) from None
    return [float(TextBlob(completion_text(each)).sentiment.polarity) for each in completions]
