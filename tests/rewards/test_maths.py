"""The final number of a solution: boxes, marks, plain text, separators, and what is no number."""

from decimal import Decimal
from typing import Any

import pytest

from trl_bayes.rewards import build_reward, gsm8k_accuracy
from trl_bayes.rewards.maths import final_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She sold 48/2 = <<48/2=24>>24 clips.\n#### 72", 72),
        ("#### -1,234.50 dollars", "-1234.5"),
        ("#### 7 of 8", 7),
        ("first #### 1 and then #### 2", 2),
        (r"so \boxed{72} and not 73", 72),
        (r"\boxed{1} no, \boxed{2}", 2),
        (r"\boxed{\$1{,}000}", 1000),
        (r"\boxed{1\,000}", 1000),
        (r"\boxed{\text{72 apples}}", 72),
        (r"\boxed{72\%}", 72),
        (r"\boxed{ -3 }", -3),
        (r"\boxed{\frac{1}{2}}", None),
        (r"\boxed{x} 3", None),
        (r"\boxed{3", 3),  # cut off: no box
        ("The answer is 72.", 72),
        ("That is $3,600.", 3600),
        ("I get .5", "0.5"),
        ("7-3", 3),
        ("it is -3", -3),
        ("####", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text: str, expected: Any) -> None:
    assert final_number(text) == (None if expected is None else Decimal(expected))


def test_accuracy_in_both_formats() -> None:
    answers = ["so it is 72\n#### 72"] * 5
    completions: list[Any] = ["#### 72.0", r"\boxed{73}", "", None, [{"role": "assistant", "content": "It is 72!"}]]
    reward = build_reward("gsm8k_accuracy")
    assert reward(prompts=[""] * 5, completions=completions, answer=answers) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert reward(completions=["1,000", "1"], answer=[1000, 1.0]) == [1.0, 1.0]


def test_an_answer_without_a_number_gives_no_reward() -> None:
    assert gsm8k_accuracy(completions=["3", "nothing"], answer=["unknown", None]) == [None, None]


def test_long_and_odd_numbers_never_raise() -> None:
    odd = ["9" * 10_000, "٣", "²", "1,,2", "1.2.3", "-", "+-3", "1e999", ",", "\\boxed{}", "\\boxed{" * 50]
    assert len(gsm8k_accuracy(completions=odd, answer=[3] * len(odd))) == len(odd)


def test_data_without_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the data's column `answer`"):
        gsm8k_accuracy(completions=["3"])
