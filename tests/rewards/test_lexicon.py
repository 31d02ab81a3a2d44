"""Evidence about tone, by a lexicon."""

import sys

import pytest

from trl_bayes.rewards import build_reward, lexicon


def test_tone_is_a_number_between_minus_and_plus_one() -> None:
    reward = build_reward("vader_sentiment")
    good, bad, neither, empty = reward(
        completions=["What a wonderful day.", [{"role": "assistant", "content": "A horrible day."}], "A day.", ""]
    )
    assert -1 <= bad < 0 < good <= 1
    assert neither == empty == 0
    assert reward.__name__ == "vader_sentiment"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lexicon._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match=r"trl_bayes\[rewards\]"):
        lexicon.vader_sentiment()
