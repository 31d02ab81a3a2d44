"""Numbers with standard errors: means over prompts by hand, and JSON that any reader takes."""

import json
import math

import pytest
import torch

from trl_bayes.statistics.estimate import Estimate, enough_of_each, join_notes, mean_of_each, stratified_mean


def test_means_over_prompts() -> None:
    values, index = torch.tensor([1.0, 3.0, 10.0, 14.0]), torch.tensor([0, 0, 1, 1])
    estimate = stratified_mean(values, index, 2)
    assert estimate.value == 7 and estimate.standard_error == pytest.approx(math.sqrt(1 + 4) / 2)
    assert not estimate.trusted and estimate.note == "too few samples"
    missing = stratified_mean(values, index, 3)
    assert math.isnan(missing.value) and not missing.trusted
    assert stratified_mean(torch.tensor([1.0, math.inf]), torch.tensor([0, 0]), 1).value == math.inf


def test_a_single_value_has_no_variance() -> None:
    means = mean_of_each(torch.tensor([2.0, 4.0, 5.0]), torch.tensor([2, 2, 0]), 3)
    assert means.mean.tolist() == pytest.approx([5.0, math.nan, 3.0], nan_ok=True)
    assert means.variance.tolist() == pytest.approx([math.nan, math.nan, 1.0], nan_ok=True)
    assert means.number.tolist() == [1, 0, 2]


def test_thirty_of_each() -> None:
    assert enough_of_each(torch.tensor([30.0, 400.0]), "things") == (True, "")
    assert enough_of_each(torch.tensor([30 - 1e-9, 400.0]).double(), "things") == (True, "")
    note = "only 29 things for some prompt (1 of 2 have fewer than 30)"
    assert enough_of_each(torch.tensor([29.9, 400.0]), "things") == (False, note)
    assert join_notes("a", "", "b", "a") == "a; b"


@pytest.mark.parametrize("value", [1.5, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("standard_error", [0.1, math.nan])
def test_json_round_trip(value: float, standard_error: float) -> None:
    estimate = Estimate(value, standard_error, False, "why")
    text = json.dumps(estimate.to_dict(), allow_nan=False)
    assert repr(Estimate.from_dict(json.loads(text))) == repr(estimate)  # repr, because NaN differs from itself
