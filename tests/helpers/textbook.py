"""The divergences as formulas.md writes them, in t = pi/p: independent of `trl_bayes.divergences`."""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Textbook(NamedTuple):
    f: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]  # f'
    slope_at_infinity: float  # of a sample outside the target's support


# In the order of `DIVERGENCES`
TEXTBOOK: dict[str, Textbook] = {
    "forward_kl": Textbook(lambda t: -t.log(), lambda t: -1 / t, 0.0),
    "reverse_kl": Textbook(lambda t: t * t.log(), lambda t: 1 + t.log(), math.inf),
    "jensen_shannon": Textbook(
        lambda t: (t * t.log() - (t + 1) * ((t + 1) / 2).log()) / 2,
        lambda t: (math.log(2) - (1 / t).log1p()) / 2,
        math.log(2) / 2,
    ),
    "total_variation": Textbook(lambda t: (t - 1).abs() / 2, lambda t: (t - 1).sign() / 2, 0.5),
    "squared_hellinger": Textbook(lambda t: (t.sqrt() - 1).square(), lambda t: 1 - t**-0.5, 1.0),
    "pearson_chi2": Textbook(lambda t: (t - 1).square(), lambda t: 2 * (t - 1), math.inf),
    "neyman_chi2": Textbook(lambda t: (1 - t).square() / t, lambda t: 1 - t**-2, 1.0),
}
