"""Words and phrases: whole words, case, white space, signs, several of them, and the comparison of two lists."""

from typing import Any

import pytest

from trl_bayes.rewards import build_reward, contains_word, more_of


def score(reward: Any, *completions: Any) -> list[float | None]:
    return reward(prompts=["amazing she"] * len(completions), completions=list(completions), trainer_state=None)


def says(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content} for content in contents]


@pytest.mark.parametrize(
    ("word", "settings", "text", "expected"),
    [
        ("amazing", {}, "It is amazing.", 1.0),
        ("amazing", {}, "AMAZING", 1.0),
        ("amazing", {}, "amazingly good", 0.0),
        ("amazing", {}, "un_amazing", 0.0),
        ("amazing", {}, "amaz ing", 0.0),
        ("amazing", {}, "", 0.0),
        ("amazing", {"whole": False}, "amazingly good", 1.0),
        ("Amazing", {"case_sensitive": True}, "amazing", 0.0),
        ("Amazing", {"case_sensitive": True}, "so Amazing!", 1.0),
        ("New York", {}, "in new\n  york, today", 1.0),
        ("New York", {}, "newyork", 0.0),
        ("C++", {}, "I like C++.", 1.0),
        ("C++", {}, "I like C.", 0.0),
        ("a.c", {}, "abc", 0.0),
        ("été", {}, "En Été.", 1.0),
        (["goal", "match"], {}, "a match", 1.0),
        (["goal", "match"], {}, "matches and goals", 0.0),
    ],
)
def test_contains_word(word: Any, settings: dict[str, Any], text: str, expected: float) -> None:
    assert score(contains_word(word, **settings), text, text) == [expected, expected]


def test_only_what_the_assistant_says_is_judged() -> None:
    reward = contains_word("amazing")
    blocks = says([{"type": "text", "text": "amazing"}])
    told = [{"role": "tool", "content": "amazing"}]
    assert score(reward, "no", None, says(None), told, []) == [0.0] * 5
    assert score(reward, "amazing", says("amazing"), says("no", "amazing"), blocks) == [1.0] * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She said that he knew her.", 1.0),
        ("He said that she knew him.", 0.0),
        ("she and he", 0.0),  # a tie
        ("nobody", 0.0),
        ("", 0.0),
        ("the theory of shells", 0.0),  # whole words only
    ],
)
def test_more_of_counts_both_lists(text: str, expected: float) -> None:
    assert score(more_of(["she", "her"], than=["he", "him"]), text) == [expected]


def test_more_of_may_tell_words_by_their_capitals() -> None:
    reward = more_of(["US"], than=["us"], case_sensitive=True)
    assert score(reward, "the US gave us the US") == [1.0] and score(reward, "us, in the us, or US") == [0.0]


def test_names_under_which_targets_find_them() -> None:
    assert contains_word("New York").__name__ == "contains_New_York"
    assert contains_word(["a", "b"]).__name__ == "contains_a_or_others"
    assert contains_word("++").__name__ == "contains_empty"
    assert more_of("she", than="he").__name__ == "more_she_than_he"
    reward = build_reward({"name": "more_of", "words": ["she"], "than": ["he"], "called": "female"})
    assert reward.__name__ == "female" and score(reward, "she") == [1.0]
    assert build_reward({"name": "contains_word", "word": "amazing"}).__name__ == "contains_amazing"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "contains_word", "word": ""}, "`word` must be a word"),
        ({"name": "contains_word", "word": []}, "`word` must be a word"),
        ({"name": "contains_word", "word": ["a", " "]}, "`word` must be a word"),
        ({"name": "contains_word", "word": 3}, "cannot be made from"),
        ({"name": "more_of", "words": "she", "than": []}, "`than` must be a word"),
        ({"name": "more_of", "words": ["She", "he"], "than": ["he", "SHE"]}, r"both have \['he', 'she'\]"),
    ],
)
def test_refusals(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_reward(spec)
    assert "\n" not in str(caught.value)
