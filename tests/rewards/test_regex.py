"""Regular expressions: found or matched in full, the flags, messages, and patterns that are none."""

from typing import Any

import pytest

from trl_bayes.rewards import build_reward, matches


@pytest.mark.parametrize(
    ("pattern", "settings", "text", "expected"),
    [
        (r"\d+", {}, "room 12b", 1.0),
        (r"\d+", {"full": True}, "room 12", 0.0),
        (r"\d+", {"full": True}, " 12\n", 1.0),
        (r"yes", {}, "YES", 0.0),
        (r"yes", {"ignore_case": True}, "YES", 1.0),
        (r"^b", {}, "a\nb", 0.0),
        (r"^b", {"multiline": True}, "a\nb", 1.0),
        (r"<a>.*</a>", {}, "<a>1\n2</a>", 0.0),
        (r"<a>.*</a>", {"dot_matches_newline": True, "full": True}, "<a>1\n2</a>", 1.0),
        (r"a", {}, "", 0.0),
        (r"", {}, "", 1.0),
    ],
)
def test_matches(pattern: str, settings: dict[str, Any], text: str, expected: float) -> None:
    reward = matches(pattern, **settings)
    assert reward(prompts=[""], completions=[text]) == [expected]
    assert reward(prompts=[[]], completions=[[{"role": "assistant", "content": text}]]) == [expected]


def test_odd_completions_and_names() -> None:
    reward = build_reward({"name": "matches", "pattern": r"^\d+$"})
    assert reward(completions=[None, [], [{"role": "tool", "content": "1"}], "1"]) == [0.0, 0.0, 0.0, 1.0]
    assert reward.__name__ == "matches_d"
    assert matches("a", called="format").__name__ == "format"


@pytest.mark.parametrize("pattern", ["(", "[a", 3, None])
def test_what_is_no_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(ValueError, match="must be a regular expression") as caught:
        matches(pattern)
    assert "\n" not in str(caught.value)
