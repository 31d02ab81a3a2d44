"""Judges: probabilities and indices are read as such, places are swapped at random, and anything else is refused."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from trl_bayes.trainers.judge import ask


PROMPTS = ["one", "two", "three", "four"] * 8
PAIRS = [(f"a{i}", f"b{i}") for i in range(len(PROMPTS))]


def likes_a(prompts: list[str], pairs: list[list[str]]) -> list[float]:
    """Whatever the place."""
    return [0.8 if pair[0].startswith("a") else 0.2 for pair in pairs]


def test_the_probability_is_that_of_the_first_wherever_it_was_shown() -> None:
    torch.manual_seed(0)
    shown: list[str] = []

    def judge(prompts: list[str], pairs: list[list[str]]) -> list[float]:
        assert prompts == PROMPTS
        shown.extend(pair[0][0] for pair in pairs)
        return likes_a(prompts, pairs)

    assert ask(judge, PROMPTS, PAIRS).tolist() == pytest.approx([0.8] * len(PAIRS))
    assert set(shown) == {"a", "b"}  # a judge that favors a place favors neither side


@pytest.mark.parametrize("index", [int, np.int64, torch.tensor], ids=["int", "numpy", "torch"])
def test_an_index_is_the_better_one(index: Any) -> None:
    def judge(prompts: list[str], pairs: list[list[str]]) -> list[Any]:
        return [index(0 if pair[0].startswith("b") else 1) for pair in pairs]

    assert ask(judge, PROMPTS, PAIRS).tolist() == [0.0] * len(PAIRS)


@pytest.mark.parametrize("verdict", [-1, None, math.nan, torch.tensor(math.nan)])
def test_one_that_cannot_say(verdict: Any) -> None:
    found = ask(lambda prompts, pairs: [verdict] * len(pairs), PROMPTS, PAIRS)
    assert found.isnan().all()


def test_probabilities_of_any_kind() -> None:
    def judge(prompts: list[str], pairs: list[list[str]]) -> np.ndarray:
        return np.array(likes_a(prompts, pairs), dtype=np.float32)

    assert ask(judge, PROMPTS, PAIRS).tolist() == pytest.approx([0.8] * len(PAIRS))


def test_columns_of_the_data_for_one_that_takes_them() -> None:
    def judge(prompts: list[str], pairs: list[list[str]], answer: list[str], **columns: Any) -> list[float]:
        assert answer == PROMPTS and not columns
        return [0.5] * len(pairs)

    ask(judge, PROMPTS, PAIRS, {"answer": PROMPTS})
    ask(likes_a, PROMPTS, PAIRS, {"answer": PROMPTS})


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        ([1.2] * 32, "returned 1.2: return for each pair the probability"),
        ([-0.1] * 32, "returned -0.1: return"),
        ([math.inf] * 32, "returned inf: return"),
        ([2] * 32, "returned 2: return"),
        ([True] * 32, "returned True: return"),
        (["A"] * 32, "returned 'A': return"),
        ([0.5] * 31, "returned 31 verdicts for 32 pairs"),
        (None, "returned NoneType: return a list"),
    ],
)
def test_anything_else_is_refused(verdicts: Sequence[Any] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(lambda prompts, pairs: verdicts, PROMPTS, PAIRS)  # type: ignore[arg-type, return-value]
