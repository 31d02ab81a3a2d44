"""The divergences as formulas.md writes them, in t = pi/p: independent of `trl_bayes.divergences`."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Textbook(NamedTuple):
    f: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]  # f'
    slope_at_infinity: float  # of a sample outside the target's support
    of: Callable[[np.ndarray, np.ndarray], float]  # D(pi||p) of two distributions


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


# In the order of `DIVERGENCES`
TEXTBOOK: dict[str, Textbook] = {
    "forward_kl": Textbook(
        f=lambda t: -t.log(),
        slope=lambda t: -1 / t,
        slope_at_infinity=0.0,
        of=lambda pi, p: kl(p, pi),
    ),
    "reverse_kl": Textbook(
        f=lambda t: t * t.log(),
        slope=lambda t: 1 + t.log(),
        slope_at_infinity=math.inf,
        of=lambda pi, p: kl(pi, p),
    ),
    "jensen_shannon": Textbook(
        f=lambda t: (t * t.log() - (t + 1) * ((t + 1) / 2).log()) / 2,
        slope=lambda t: (math.log(2) - (1 / t).log1p()) / 2,
        slope_at_infinity=math.log(2) / 2,
        of=lambda pi, p: (kl(pi, (pi + p) / 2) + kl(p, (pi + p) / 2)) / 2,
    ),
    "total_variation": Textbook(
        f=lambda t: (t - 1).abs() / 2,
        slope=lambda t: (t - 1).sign() / 2,
        slope_at_infinity=0.5,
        of=lambda pi, p: float(np.maximum(pi - p, 0).sum()),
    ),
    "squared_hellinger": Textbook(
        f=lambda t: (t.sqrt() - 1).square(),
        slope=lambda t: 1 - t**-0.5,
        slope_at_infinity=1.0,
        of=lambda pi, p: 2 - 2 * float(np.sqrt(pi * p).sum()),
    ),
    "pearson_chi2": Textbook(
        f=lambda t: (t - 1).square(),
        slope=lambda t: 2 * (t - 1),
        slope_at_infinity=math.inf,
        of=lambda pi, p: float((pi**2 / p).sum()) - 1,
    ),
    "neyman_chi2": Textbook(
        f=lambda t: (1 - t).square() / t,
        slope=lambda t: 1 - t**-2,
        slope_at_infinity=1.0,
        of=lambda pi, p: float((p**2 / pi).sum()) - 1,
    ),
}
