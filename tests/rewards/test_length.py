"""Lengths in every unit, both ends of an interval, and settings that allow nothing."""

import math
from typing import Any

import pytest

from trl_bayes.rewards import build_reward, length_between, length_in


TEXTS = ["", " a ", "one two\nthree ", [{"role": "assistant", "content": "a b"}], None]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("words", [0.0, 1.0, 3.0, 2.0, 0.0]),
        ("characters", [0.0, 3.0, 14.0, 3.0, 0.0]),
        ("lines", [0.0, 1.0, 2.0, 1.0, 0.0]),
        ("tokens", [0.0, 1.0, 5.0, 2.0, 1.0]),
    ],
)
def test_length_in_each_unit(unit: str, expected: list[float]) -> None:
    ids = [[0] * n for n in (0, 1, 5, 2, 1)]
    reward = length_in(unit)
    assert reward(prompts=["a prompt"] * 5, completions=TEXTS, completion_ids=ids) == expected
    assert reward.__name__ == f"length_in_{unit}"


def test_both_ends_of_the_interval_count() -> None:
    reward = build_reward({"name": "length_between", "minimum": 2, "maximum": 3})
    assert reward(completions=["a", "a b", "a b c", "a b c d"]) == [0.0, 1.0, 1.0, 0.0]
    assert length_between(minimum=2)(completions=["a", "a " * 999]) == [0.0, 1.0]
    assert length_between(maximum=1, unit="tokens")(completions=["", ""], completion_ids=[[3], [3, 4]]) == [1.0, 0.0]
    assert length_between(called="short").__name__ == "short"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "length_in", "unit": "word"}, "Unknown `unit='word'`"),
        ({"name": "length_between", "minimum": 3, "maximum": 2}, "not below it, but got 3 and 2"),
        ({"name": "length_between", "minimum": -1}, "must be 0 or more"),
        ({"name": "length_between", "maximum": math.nan}, "not below it"),
        ({"name": "length_between", "maximum": "nine"}, "`maximum` of the reward 'length_between' must be a number"),
    ],
)
def test_refusals(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_reward(spec)
    assert "\n" not in str(caught.value)


def test_tokens_need_the_trainer() -> None:
    with pytest.raises(ValueError, match="needs `completion_ids`"):
        length_in("tokens")(completions=["a"])
