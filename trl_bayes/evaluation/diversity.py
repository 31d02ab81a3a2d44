"""How varied a set of samples is: distinct n-grams, self-BLEU and the share of distinct texts.

A sequence is a list of tokens (anything hashable). All these depend on the number of samples: compare sets of the same
size only. Nothing here knows a model.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from ..language_models.completions import Completions
from ..statistics.estimate import Estimate


Tokens = Sequence[Hashable]

# What a precision without a match counts as, in matches (Chen and Cherry's first smoothing, which Texygen uses)
_EPSILON = 0.1


def _ngrams(sequence: Tokens, n: int) -> Iterator[tuple[Hashable, ...]]:
    return (tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))


def distinct_n(sequences: Sequence[Tokens], n: int) -> float:
    """Distinct-n: the number of different n-grams over the number of all n-grams, pooled over the sequences.

    https://huggingface.co/papers/1510.03055. Between 0 and 1; NaN where there is no n-gram.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    counts = Counter(ngram for sequence in sequences for ngram in _ngrams(sequence, n))
    return len(counts) / counts.total() if counts else math.nan


def share_distinct(texts: Sequence[Hashable]) -> float:
    """The number of different texts over the number of texts; NaN where there is none."""
    return len(set(texts)) / len(texts) if texts else math.nan


def self_bleu(
    sequences: Sequence[Tokens], max_order: int = 4, num_references: int | None = None, seed: int = 0
) -> float:
    """Self-BLEU: the mean BLEU of each sequence with the others as references. Low is varied, 1 is all the same.

    Texygen, https://huggingface.co/papers/1802.01886. BLEU is the sentence's own: the geometric mean of its n-gram
    precisions, each n-gram counted at most as often as in the reference that has most of it, times the brevity penalty
    against the reference of the closest length. A precision without a match counts as 0.1 matches, and orders longer
    than the sequence are left out, so that short sequences have a value too.

    Args:
        sequences: at least two that are not empty; empty ones are left out.
        max_order (`int`, *optional*, defaults to `4`): the longest n-grams.
        num_references (`int`, *optional*): compares with this many sequences, drawn with the seed, without the
            sequence itself if it is among them. Defaults to all the others; the time is linear in the number of
            sequences either way.
        seed (`int`, *optional*, defaults to `0`): of the references drawn.

    Returns:
        A number in [0, 1]; NaN with fewer than two sequences.

    Raises:
        ValueError: max_order below 1, or num_references below 2.
    """
    if max_order < 1:
        raise ValueError(f"`max_order` must be at least 1, got {max_order}.")
    if num_references is not None and num_references < 2:
        raise ValueError(f"`num_references` must be at least 2, got {num_references}.")
    sequences = [sequence for sequence in sequences if len(sequence) > 0]
    if len(sequences) < 2:
        return math.nan
    chosen = range(len(sequences))
    if num_references is not None and num_references < len(sequences):
        chosen = random.Random(seed).sample(chosen, num_references)  # type: ignore[assignment]
    references = _References(sequences, chosen, max_order)
    return sum(references.bleu(index) for index in range(len(sequences))) / len(sequences)


class _References:
    """References with one left out at a time, each in the time of one sequence.

    For each n-gram the largest count in a reference, whose it is, and the next largest: leaving out the owner of the
    largest leaves the next.
    """

    def __init__(self, sequences: Sequence[Tokens], chosen: Sequence[int], max_order: int):
        self.sequences = sequences
        self.chosen = set(chosen)
        self.max_order = max_order
        self.lengths = Counter(len(sequences[index]) for index in chosen)
        self.most: dict[tuple[Hashable, ...], tuple[int, int, int]] = {}  # n-gram: largest, its owner, next largest
        for index in chosen:
            for order in range(1, max_order + 1):
                for ngram, count in Counter(_ngrams(sequences[index], order)).items():
                    largest, owner, following = self.most.get(ngram, (0, -1, 0))
                    if count > largest:
                        self.most[ngram] = (count, index, largest)
                    elif count > following:
                        self.most[ngram] = (largest, owner, count)

    def bleu(self, index: int) -> float:
        sequence = self.sequences[index]
        orders = range(1, min(self.max_order, len(sequence)) + 1)
        log_precision = sum(math.log(self._precision(index, order)) for order in orders) / len(orders)
        return math.exp(log_precision + min(0.0, 1 - self._closest_length(index) / len(sequence)))

    def _precision(self, index: int, order: int) -> float:
        sequence = self.sequences[index]
        matches = 0
        for ngram, count in Counter(_ngrams(sequence, order)).items():
            largest, owner, following = self.most.get(ngram, (0, -1, 0))
            matches += min(count, following if owner == index else largest)
        return (matches or _EPSILON) / (len(sequence) - order + 1)

    def _closest_length(self, index: int) -> int:
        length = len(self.sequences[index])
        itself = index in self.chosen
        others = [other for other, count in self.lengths.items() if count > (itself and other == length)]
        return min(others, key=lambda other: (abs(other - length), other))


def jackknife_standard_error(
    items: Sequence[Tokens] | Sequence[Hashable], measure: Callable[[list], float], num_groups: int = 20
) -> float:
    """Standard error of a measure of a set of samples, by leaving out one group of them at a time.

    A bootstrap would draw the same sample twice, which is what these measures look for; the jackknife never does, and
    it errs upwards on average (the inequality of Efron and Stein). Group g has the items g, g + num_groups, ..., so
    that the result depends on the items alone.

    Args:
        items: the samples, in an order that does not matter to the measure.
        measure: of a list of items.
        num_groups (`int`, *optional*, defaults to `20`): at most the number of items.

    Returns:
        NaN with fewer than two items, or where the measure is NaN without a group.
    """
    num_groups = min(num_groups, len(items))
    if num_groups < 2:
        return math.nan
    values = [
        measure([item for index, item in enumerate(items) if index % num_groups != group])
        for group in range(num_groups)
    ]
    mean = sum(values) / num_groups
    return math.sqrt((num_groups - 1) / num_groups * sum((value - mean) ** 2 for value in values))


def diversity_estimates(completions: Completions) -> dict[str, Estimate]:
    """Distinct-1 to distinct-3, self-BLEU and the share of distinct completions, of all samples together.

    A sequence is a completion's tokens, without prompt and EOS. Compare only sets with the same number of samples of
    each prompt. Standard errors are the jackknife's.
    """

    def estimate(items: list, measure: Any) -> Estimate:
        value = measure(items)
        if math.isnan(value):
            return Estimate(math.nan, trusted=False, note="too few samples")
        return Estimate(value, jackknife_standard_error(items, measure))

    tokens = completions.tokens()
    return {
        **{f"distinct_{n}": estimate(tokens, lambda items, n=n: distinct_n(items, n)) for n in (1, 2, 3)},
        "self_bleu": estimate(tokens, self_bleu),
        "share_distinct": estimate(completions.outcomes(), share_distinct),
    }
