"""Evidence about tone: how positive a text is, by the words that it uses. A soft reward that needs no model."""

from functools import cache
from typing import Any

from .texts import RewardFunction, completion_text, named


def vader_sentiment(called: str = "vader_sentiment") -> RewardFunction:
    """
    Makes the reward "compound sentiment of the completion", from -1 (negative) to 1 (positive).

    By the lexicon and rules of VADER (Hutto and Gilbert, 2014) as the package vaderSentiment has them. A text without
    a word of the lexicon is 0. It counts words, so a text can be made positive by repeating them: a proxy, to be
    compared with another judgment of the same texts.

    Args:
        called (`str`, *optional*, defaults to `"vader_sentiment"`): name in logs and targets.

    Returns:
        `Callable`: a reward function.

    Raises:
        ImportError: vaderSentiment is not installed.
    """
    analyzer = _analyzer()

    def reward(completions: list[Any], **kwargs: Any) -> list[float | None]:
        return [float(analyzer.polarity_scores(completion_text(each))["compound"]) for each in completions]

    return named(reward, called)


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ImportError(
            "`vader_sentiment` needs the package vaderSentiment: pip install 'trl_bayes[rewards]'."
        ) from None
    return SentimentIntensityAnalyzer()
