"""The fitted coefficient by hand, and that it neither loses nor is misled by what cannot be fitted."""

import math

import pytest
import torch

from trl_bayes.statistics.control_variates import Influence, best_coefficient, controlled


def influence(of_a: torch.Tensor, of_b: torch.Tensor) -> Influence:
    """Of a single prompt."""
    return Influence(of_a, of_b, torch.zeros(len(of_a), dtype=torch.int64))


@pytest.mark.parametrize(
    ("covariance", "variance", "c"),
    [
        (-2.0, 4.0, 0.5),
        (2.0, 4.0, 0.0),
        (-9.0, 4.0, 1.0),
        (-1.0, 0.0, 0.0),
        (math.nan, 1.0, 0.0),
        (-1.0, math.nan, 0.0),
    ],
)
def test_the_coefficient_is_kept_between_0_and_1(covariance: float, variance: float, c: float) -> None:
    assert best_coefficient(torch.tensor(covariance), torch.tensor(variance)) == c


def test_what_goes_along_is_taken_out() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, rest = (torch.randn(400, generator=generator, dtype=torch.float64) for _ in range(2))
    of_a, of_b = 2 * noise + rest / 10, -2.5 * noise
    a, b = torch.tensor([3.0]).double(), torch.tensor([-0.1]).double()
    found = controlled(a, b, [influence(of_a, of_b)])
    assert found.coefficient == pytest.approx(0.8, abs=0.02)
    assert found.value.item() == pytest.approx(3 - 0.1 * found.coefficient)
    together = of_a + found.coefficient * of_b
    assert found.variance.item() == pytest.approx(together.square().sum().item() / (400 * 399))
    assert found.variance < of_a.square().sum() / (400 * 399) / 300


def test_independent_sets_and_further_variance_count() -> None:
    ones = torch.tensor([1.0, -1.0] * 50, dtype=torch.float64)
    zero = torch.zeros_like(ones)
    a = torch.zeros(1, dtype=torch.float64)
    near = influence(ones, -ones)
    assert controlled(a, a, [near]).coefficient == 1
    assert controlled(a, a, [near, influence(zero, ones)]).coefficient == pytest.approx(0.5)
    more = torch.tensor([3 * 100 / (100 * 99)], dtype=torch.float64)
    assert controlled(a, a, [near], more).coefficient == pytest.approx(0.25)


def test_one_coefficient_for_all_prompts() -> None:
    ones = torch.tensor([1.0, -1.0] * 50, dtype=torch.float64)
    index = torch.cat([torch.zeros(100), torch.ones(100)]).long()
    both = Influence(torch.cat([ones, ones]), torch.cat([-ones, 0 * ones]), index)
    found = controlled(torch.zeros(2).double(), torch.tensor([1.0, 1.0]).double(), [both])
    assert found.value.tolist() == [1.0, 1.0] and found.variance[0] == 0 < found.variance[1]


def test_nothing_is_lost_where_the_control_variate_has_no_value() -> None:
    ones = torch.tensor([1.0, -1.0] * 50, dtype=torch.float64)
    a = torch.tensor([2.0]).double()
    found = controlled(a, torch.tensor([math.nan]).double(), [influence(ones, ones * math.nan)])
    assert found.value.item() == 2 and found.coefficient == 0 and found.variance > 0
