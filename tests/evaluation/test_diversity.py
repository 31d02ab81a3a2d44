"""The measures of diversity against counting by hand and against a slow BLEU written from its definition."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_bayes.evaluation.diversity import distinct_n, jackknife_standard_error, self_bleu, share_distinct


def test_distinct_n_counts() -> None:
    sequences = ["abab", "abc", "", "x"]
    assert distinct_n(sequences, 1) == 4 / 8  # a b c x
    assert distinct_n(sequences, 2) == 3 / 5  # ab ba bc of ab ba ab ab bc
    assert distinct_n(sequences, 3) == 3 / 3


def test_nothing_to_measure_is_nan() -> None:
    assert math.isnan(distinct_n([], 1))
    assert math.isnan(distinct_n(["ab"], 3))
    assert math.isnan(share_distinct([]))
    assert math.isnan(self_bleu([]))
    assert math.isnan(self_bleu(["abc", ""]))
    assert math.isnan(jackknife_standard_error([], len))
    assert math.isnan(jackknife_standard_error(["abc"], len))


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        distinct_n(["ab"], 0)
    with pytest.raises(ValueError, match="`max_order` must be at least 1"):
        self_bleu(["ab", "b"], max_order=0)
    with pytest.raises(ValueError, match="`num_references` must be at least 2"):
        self_bleu(["ab", "b"], num_references=1)


def test_share_distinct() -> None:
    assert share_distinct(["a", "b", "a", "c"]) == 0.75
    assert share_distinct(["a"] * 10) == 0.1


def slow_bleu(hypothesis: str, references: list[str], max_order: int) -> float:
    def grams(text: str, n: int) -> Counter:
        return Counter(text[i : i + n] for i in range(len(text) - n + 1))

    log_precisions = []
    for n in range(1, min(max_order, len(hypothesis)) + 1):
        own = grams(hypothesis, n)
        matches = sum(min(count, max(grams(r, n)[gram] for r in references)) for gram, count in own.items())
        log_precisions.append(math.log((matches or 0.1) / own.total()))
    closest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    penalty = min(1.0, math.exp(1 - closest / len(hypothesis)))
    return penalty * math.exp(sum(log_precisions) / len(log_precisions))


@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=2, max_size=8), st.integers(1, 4))
def test_self_bleu_is_the_mean_bleu_with_the_others(texts: list[str], max_order: int) -> None:
    slow = [slow_bleu(text, texts[:i] + texts[i + 1 :], max_order) for i, text in enumerate(texts)]
    assert self_bleu(texts, max_order) == pytest.approx(sum(slow) / len(slow))


def test_self_bleu_of_equal_and_of_unrelated_sequences() -> None:
    assert self_bleu(["abcdef"] * 5) == pytest.approx(1)
    assert self_bleu([["pass"]] * 2) == pytest.approx(1)  # shorter than four tokens
    assert self_bleu(["abcdef", "ghijkl", "mnopqr"]) < 0.05


def test_self_bleu_with_a_subset_of_references() -> None:
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcd", k=8)) for _ in range(60)]
    chosen = random.Random(3).sample(range(60), 10)
    slow = [slow_bleu(text, [texts[j] for j in chosen if j != i], max_order=4) for i, text in enumerate(texts)]
    assert self_bleu(texts, num_references=10, seed=3) == pytest.approx(sum(slow) / len(slow))
    assert self_bleu(texts, num_references=100) == self_bleu(texts)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    generator = random.Random(0)
    values = [generator.gauss(0, 1) for _ in range(400)]
    variance = sum((value - sum(values) / 400) ** 2 for value in values) / 399
    exact = math.sqrt(variance / 400)
    assert jackknife_standard_error(values, lambda v: sum(v) / len(v), num_groups=400) == pytest.approx(exact)
    assert jackknife_standard_error(values, lambda v: sum(v) / len(v)) == pytest.approx(exact, rel=0.5)


def test_jackknife_bounds_the_spread_of_distinct_n() -> None:
    """Over 200 sets of samples: on average not below the standard deviation, nor absurdly above it."""
    generator = random.Random(0)
    sets = [["".join(generator.choices("abcdefgh", k=4)) for _ in range(100)] for _ in range(200)]
    values = [distinct_n(texts, 3) for texts in sets]
    mean = sum(values) / 200
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 199)
    errors = [jackknife_standard_error(texts, lambda t: distinct_n(t, 3)) for texts in sets]
    assert 0.9 * spread < math.sqrt(sum(error**2 for error in errors) / 200) < 3 * spread
