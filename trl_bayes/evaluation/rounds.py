"""When enough samples have been drawn: rounds of them, until the standard errors are as small as was asked for.

To stop at a small standard error is to stop rather where it happens to be underestimated. So the first round is never
small, each is half as large again as all before it, and a number counts only where it is trusted
([`~trl_bayes.statistics.estimate.Estimate`]): `tests/evaluation/test_rounds.py` measures how often the intervals then
cover the truth.
"""

import math
from collections.abc import Iterable, Mapping

from ..statistics.estimate import Estimate


FIRST_ROUND = 100  # samples of each prompt
_LEAST_GROWTH, _MOST_GROWTH = 1.5, 4.0
_GROWTH_OF_UNKNOWN = 2.0  # where there is no standard error to go by


def growth_needed(metrics: Mapping[str, Estimate], names: Iterable[str], standard_error: float) -> float:
    """
    How many times as many samples the worst of some numbers needs; 1 where there are enough.

    A number needs a standard error of at most `standard_error`, or of `standard_error` times its value if that is
    more, and to be trusted. One that is infinite is left out: no number of samples changes it.

    Args:
        metrics (`dict[str, Estimate]`): what has been estimated.
        names (`Iterable[str]`): of those that count, as far as they are there.
        standard_error (`float`): in nats, and relative; 0 is never reached.
    """
    return max((_growth(metrics[name], standard_error) for name in names if name in metrics), default=1.0)


def _growth(estimate: Estimate, standard_error: float) -> float:
    if math.isinf(estimate.value):
        return 1.0
    if not estimate.trusted or math.isnan(estimate.standard_error):
        return _GROWTH_OF_UNKNOWN
    allowed = standard_error * max(1.0, abs(estimate.value))
    if estimate.standard_error <= allowed:
        return 1.0
    wanted = (estimate.standard_error / allowed) ** 2 if allowed else math.inf
    return min(max(wanted, _LEAST_GROWTH), _MOST_GROWTH)


def next_round(number: int, growth: float, most: int) -> int:
    """How many samples there should be after another round."""
    return min(most, math.ceil(number * growth))
