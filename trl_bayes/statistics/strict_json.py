"""JSON as all programs read it: without NaN and infinity."""

import math
from collections.abc import Mapping
from typing import Any

import numpy
from torch import Tensor


def strict_json(value: Any, digits: int | None = None) -> Any:
    """
    A value as strict JSON: a number that is not finite is `None`, tensors are lists, and what JSON has not is text.

    Args:
        value (`Any`): numbers, texts, and lists and mappings of them.
        digits (`int`, *optional*): significant ones, to which floats are rounded.
    """
    if isinstance(value, Mapping):
        return {str(key): strict_json(entry, digits) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(entry, digits) for entry in value]
    if isinstance(value, Tensor | numpy.ndarray | numpy.generic):
        return strict_json(value.tolist(), digits)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value if value is None or isinstance(value, str | int) else str(value)
