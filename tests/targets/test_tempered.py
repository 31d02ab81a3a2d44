"""The prior to a power: phi = (a - 1) log pi_0."""

import math
from typing import Any

import pytest
import torch

from trl_bayes.targets import Constraint, Context, Product, Tempered


def test_the_posterior_is_the_prior_to_a_power(enumerated: Any) -> None:
    log_prior = enumerated.log_prior[0]
    for a in (0.5, 1.0, 2.0):
        phi = Tempered(a)(torch.zeros(len(log_prior), 1), enumerated.context(0))
        torch.testing.assert_close(
            (log_prior + phi).softmax(dim=0), (a * log_prior).softmax(dim=0), atol=1e-6, rtol=1e-5
        )


def test_it_reads_no_reward() -> None:
    context = Context(torch.tensor([-2.0, -3.0]), torch.tensor([0, 0]))
    assert Tempered(3.0)(torch.full((2, 1), math.nan), context).tolist() == [-4.0, -6.0]


def test_in_a_product() -> None:
    product = Product([Tempered(2.0), Constraint()])
    assert product.needs_context
    assert product.hard
    assert not product.needs_prior_samples
    assert product.is_fitted
    context = Context(torch.tensor([-2.0, -3.0, -1.0]), torch.tensor([0, 0, 0]))
    assert product(torch.tensor([[1.0], [0.0], [1.0]]), context).tolist() == [-2.0, -math.inf, -1.0]
    unscored = product(torch.tensor([[1.0], [math.nan], [1.0]]), context)  # not as good as one that holds
    assert unscored.tolist() == pytest.approx([-2.0, math.nan, -1.0], nan_ok=True)
    powers = Product([Tempered(2.0), Tempered(1.5)])
    assert not powers.reads_rewards
    assert powers(torch.full((3, 1), math.nan), context).tolist() == [-3.0, -4.5, -1.5]


def test_settings() -> None:
    assert repr(Tempered(2)) == "Tempered(a=2.0)"
    assert not Tempered(2).hard
    with pytest.raises(ValueError, match="Tempered needs to know the prompts and the prior's probabilities: call it"):
        Tempered(2.0)(torch.zeros(2, 1))
    for a in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="`Tempered` needs a positive finite power `a`"):
            Tempered(a)
