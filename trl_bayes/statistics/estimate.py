"""A number estimated from samples of several prompts, with its standard error and whether to trust it.

Prompts are strata: a quantity is estimated for each prompt and then averaged over the prompts, `mean_p a_p`, with the
standard error `sqrt(sum_p se_p^2) / P`. Arrays of samples are flat, `(N,)`, with `prompt_index` (N,) saying whose they
are.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


MIN_EFFECTIVE_SAMPLES = 30


class Estimate(NamedTuple):
    """A number estimated from samples.

    `value` may be infinite, or NaN where there is no estimate; `standard_error` is NaN where it has none. `trusted` is
    False for a number that should not be read as one, and `note` says why, or how to read it.
    """

    value: float
    standard_error: float = math.nan
    trusted: bool = True
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: a number that is not finite is `null`, with its name in `value_is`."""
        value, standard_error = float(self.value), float(self.standard_error)
        record = {
            "value": value if math.isfinite(value) else None,
            "standard_error": standard_error if math.isfinite(standard_error) else None,
            "trusted": bool(self.trusted),
            "note": self.note,
        }
        return record if math.isfinite(value) else {**record, "value_is": str(value)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Estimate":
        """What [`~Estimate.to_dict`] wrote."""
        value, standard_error = record.get("value"), record.get("standard_error")
        return cls(
            float(record.get("value_is", "nan")) if value is None else float(value),
            math.nan if standard_error is None else float(standard_error),
            bool(record.get("trusted", True)),
            str(record.get("note", "")),
        )


class Means(NamedTuple):
    """Mean of each prompt's values, the variance of that mean, and the number of values, each `(P,)`."""

    mean: Tensor
    variance: Tensor
    number: Tensor


def mean_of_each(values: Tensor, prompt_index: Tensor, num_prompts: int) -> Means:
    """A prompt without values has the mean NaN, one with a single value the variance NaN."""
    values = values.double()
    count = torch.bincount(prompt_index, minlength=num_prompts).double()
    mean = torch.bincount(prompt_index, weights=values, minlength=num_prompts) / count
    squares = (values - mean[prompt_index]) ** 2
    variance = torch.bincount(prompt_index, weights=squares, minlength=num_prompts) / (count - 1)
    return Means(mean, torch.where(count > 1, variance, torch.nan) / count, count)


def average(values: Tensor, variance: Tensor, trusted: bool = True, note: str = "") -> Estimate:
    """The mean over prompts of independent estimates, from their values and variances, `(P,)` each."""
    value, standard_error = values.mean().item(), variance.sum().sqrt().item() / len(values)
    if math.isnan(value):
        trusted, note = False, note or "no samples for some prompt"
    return Estimate(value, standard_error, trusted, note)


def stratified_mean(values: Tensor, prompt_index: Tensor, num_prompts: int) -> Estimate:
    """The mean over prompts of each prompt's mean.

    Args:
        values: (N,); an infinite one makes the mean infinite.
        prompt_index: (N,) int64, from 0 to num_prompts - 1.
        num_prompts: P.
    """
    if values.isinf().any():
        return Estimate(values[values.isinf()].sum().item(), note="infinite for some sample")
    means = mean_of_each(values, prompt_index, num_prompts)
    enough = bool((means.number >= 2).all()) and means.number.sum().item() >= MIN_EFFECTIVE_SAMPLES
    return average(means.mean, means.variance, enough, "" if enough else "too few samples")


def enough_of_each(number: Tensor, what: str) -> tuple[bool, str]:
    """Whether every prompt has at least 30 of something, `(P,)`, and if not, a note that says so."""
    fewest = int(number.min().item() + 1e-6)  # an effective number may be a rounding error below a whole one
    if fewest >= MIN_EFFECTIVE_SAMPLES:
        return True, ""
    few = int((number + 1e-6 < MIN_EFFECTIVE_SAMPLES).sum())
    return (
        False,
        f"only {fewest} {what} for some prompt ({few} of {len(number)} have fewer than {MIN_EFFECTIVE_SAMPLES})",
    )


def join_notes(*notes: str) -> str:
    """Several notes as one, each once."""
    return "; ".join(dict.fromkeys(note for note in notes if note))
