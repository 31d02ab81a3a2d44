"""A second judgment of tone, which training does not see: the mean polarity of the words that TextBlob knows."""

from typing import Any

from textblob import TextBlob

from trl_bayes.rewards.texts import completion_text


def polarity(completions: list[Any], **kwargs: Any) -> list[float | None]:
    """From -1 to 1. A mean over words, unlike VADER's sum: repeating a positive word does not raise it."""
    return [float(TextBlob(completion_text(each)).sentiment.polarity) for each in completions]
