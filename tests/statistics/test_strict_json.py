"""Strict JSON: what is in it, and what is not."""

import json
import math
from pathlib import Path

import numpy
import torch

from trl_bayes.statistics.strict_json import strict_json


def test_numbers_that_json_has_not() -> None:
    value = {1: [math.inf, -math.inf, math.nan, 1 / 3], "two": (True, None, 7, "text")}
    assert strict_json(value) == {"1": [None, None, None, 1 / 3], "two": [True, None, 7, "text"]}
    assert strict_json(value, digits=6) == {"1": [None, None, None, 0.333333], "two": [True, None, 7, "text"]}


def test_tensors_and_what_else_there_is() -> None:
    value = [torch.tensor([1.5, math.nan]), torch.tensor(2), numpy.float64(0.5), numpy.inf, Path("a")]
    assert strict_json(value) == [[1.5, None], 2, 0.5, None, "a"]
    assert json.loads(json.dumps(strict_json(value), allow_nan=False)) == strict_json(value)
