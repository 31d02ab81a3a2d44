"""The product of experts: phi = sum_i phi_i."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_bayes.targets import (
    Calibrated,
    ChiSquared,
    Constraint,
    Moments,
    PriorScores,
    Product,
    Target,
    Tempered,
    Tilt,
)


INF, NAN = math.inf, math.nan
NAMES = ["compiles", "quality"]


class Counter(Target):
    """A target that learns: it counts what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def log_potential(self, rewards: Tensor) -> Tensor:
        self.seen += len(rewards)
        return torch.zeros(len(rewards))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def constrained_tilt() -> Product:
    product = Product([Constraint(rewards="compiles"), Tilt(beta=0.5, rewards="quality")])
    product.bind(NAMES, torch.tensor([1.0, 3.0]))
    return product


def test_phi_is_the_sum_of_the_factors() -> None:
    rewards = torch.tensor([[1.0, 2.0], [0.0, 2.0], [1.0, -1.0]])
    assert constrained_tilt().log_potential(rewards).tolist() == pytest.approx([12.0, -INF, -6.0])


def test_two_tilts_are_one() -> None:
    rewards = torch.tensor([[1.0, 2.0], [0.3, -1.0]])
    product = Product([Tilt(0.5), Tilt(0.25)])
    product.bind(NAMES)
    torch.testing.assert_close(product.log_potential(rewards), Tilt(1 / 6).log_potential(rewards))


def test_a_factor_that_does_not_apply_adds_nothing() -> None:
    rewards = torch.tensor([[NAN, 2.0], [0.0, NAN], [1.0, NAN], [NAN, NAN]])
    phi = constrained_tilt().log_potential(rewards)
    assert phi.tolist() == pytest.approx([12.0, -INF, 0.0, NAN], nan_ok=True)


def test_factors_are_bound() -> None:
    product = Product([Tilt(0.5, rewards="quality"), Tilt(0.5, rewards="style")])
    with pytest.raises(ValueError, match="Tilt reads the reward 'style', but the reward functions are"):
        product.bind(NAMES)


def test_a_product_needs_what_its_factors_need() -> None:
    assert not constrained_tilt().needs_context
    assert not constrained_tilt().needs_prior_samples
    assert Product([Tilt(0.5), Tempered(2.0)]).needs_context
    product = Product([Tilt(0.5), Product([ChiSquared(1.0)])])
    assert product.needs_context
    assert product.needs_prior_samples
    assert not product.is_fitted
    assert not product.fits_under_others


def test_factors_learn_from_the_prior_alone() -> None:
    """A threshold beside a constraint is the prior's, as it would be without the constraint."""
    rewards = torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(0))
    prior = PriorScores(rewards, torch.zeros(2, 50), torch.tensor([4, 1]))
    alone, factor = ChiSquared(0.5, rewards="quality"), ChiSquared(0.5, rewards="quality")
    product = Product([Constraint(rewards="compiles"), factor])
    for target in (alone, product):
        target.bind(NAMES)
        target.fit(prior)
    assert product.is_fitted
    assert torch.equal(factor.table.values, alone.table.values)


def test_diagnostics_of_all_factors() -> None:
    prior = PriorScores(torch.rand(1, 500, 2), torch.zeros(1, 500), torch.tensor([0]))
    product = Product([Calibrated("identity", 1.0), Moments({"quality": 0.55}), Calibrated("identity", 2.0)])
    product.bind(NAMES)
    product.fit(prior)
    assert {"calibrated/tied_frac", "2/calibrated/tied_frac", "moments/quality", "moments/ess"} <= set(
        product.diagnostics()
    )


def test_a_product_is_hard_if_a_factor_is() -> None:
    assert constrained_tilt().hard
    assert not Product([Tilt(0.5), Tilt(0.1)]).hard
    assert Product([Tilt(0.5), Product([Constraint()])]).hard
    assert not Product.hard


def test_settings() -> None:
    assert repr(constrained_tilt()) == (
        "Product(factors=[Constraint(threshold=0.5, rewards=['compiles']), Tilt(beta=0.5, rewards=['quality'])])"
    )


def test_state_is_that_of_the_factors() -> None:
    def make() -> Product:
        return Product([Tilt(0.5), Counter(), Product([Counter()])])

    product, restored = make(), make()
    product.log_potential(torch.zeros(3, 1))
    assert product.state_dict() == {"0": {}, "1": {"seen": 3}, "2": {"0": {"seen": 3}}}
    restored.load_state_dict(product.state_dict())
    assert restored.state_dict() == product.state_dict()


def test_the_caller_s_list_is_copied() -> None:
    factors: list[Target] = [Tilt(0.5)]
    product = Product(factors)
    factors.append(Constraint())
    assert len(product.factors) == 1


def test_no_factors() -> None:
    with pytest.raises(ValueError, match=r"^`Product` needs at least one factor\.$"):
        Product([])
