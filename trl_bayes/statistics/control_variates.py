"""Estimates with a control variate: something of mean zero is added, as much as makes the error smallest.

An estimate `a + c b`, b of mean zero, has the variance `Var(a) + 2 c Cov(a, b) + c^2 Var(b)`, which
`c = -Cov(a, b) / Var(b)` makes smallest. c is fitted to the samples themselves and kept in [0, 1], for control
variates whose c is 1 where they cancel the error of first order; with c = 0 nothing is added, so that the fit never
loses.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def best_coefficient(covariance: Tensor, variance_of_b: Tensor) -> Tensor:
    """The c in [0, 1] that makes the variance of `a + c b` smallest; 0 where there is nothing to fit it to."""
    best = torch.where(variance_of_b > 0, -covariance / variance_of_b, 0.0)
    return torch.where(best.isfinite(), best, 0.0).clamp(0.0, 1.0)


class Influence(NamedTuple):
    """
    How much each of N independent samples moves a and b of its prompt, times N (the delta method's influence).

    `of_a` and `of_b` are (N,) with mean zero in each prompt, and `prompt_index` (N,) says whose they are.
    """

    of_a: Tensor
    of_b: Tensor
    prompt_index: Tensor


class Controlled(NamedTuple):
    """`a + c b` of each prompt (P,), its variance (P,), and c."""

    value: Tensor
    variance: Tensor
    coefficient: float


def controlled(
    a: Tensor, b: Tensor, influences: list[Influence], more_variance_of_b: Tensor | float = 0.0
) -> Controlled:
    """
    `a + c b` with the c in [0, 1] that makes the variance of the mean over prompts smallest.

    Args:
        a (`torch.Tensor`): (P,) estimates.
        b (`torch.Tensor`): (P,) of mean zero.
        influences (`list[Influence]`): of every set of samples that a and b depend on; the sets are independent.
        more_variance_of_b (`torch.Tensor`, *optional*): (P,), what the influences do not show.
    """
    of_a, covariance, of_b = (torch.zeros_like(a) for _ in range(3))
    for x, y, index in influences:
        number = torch.bincount(index, minlength=len(a)).double()
        scale = number * (number - 1)
        of_a += torch.bincount(index, x * x, len(a)) / scale
        covariance += torch.bincount(index, x * y, len(a)) / scale
        of_b += torch.bincount(index, y * y, len(a)) / scale
    of_b = of_b + more_variance_of_b
    c = best_coefficient(covariance.sum(), of_b.sum()).item()
    return Controlled(a + c * b if c else a, of_a + 2 * c * covariance + c * c * of_b if c else of_a, c)
