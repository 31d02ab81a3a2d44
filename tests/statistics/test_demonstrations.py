"""The clone's distance from the expert, by held-out demonstrations, and the temperature by the paper's rule."""

import math

import pytest
import torch

from trl_bayes.statistics.demonstrations import kl_from_expert, temperature_by_rule


EXPERT = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
CLONE = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
EXACT = (EXPERT * (EXPERT / CLONE).log()).sum().item()
ENTROPY = -(EXPERT * EXPERT.log()).sum().item()


def test_is_the_kl_where_the_entropy_is_known_and_a_bound_where_it_is_not() -> None:
    drawn = torch.multinomial(EXPERT, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = kl_from_expert(CLONE.log()[drawn], ENTROPY)
    assert abs(estimate.value - EXACT) < 3 * estimate.standard_error < 0.02
    bound = kl_from_expert(CLONE.log()[drawn])
    assert bound.value == pytest.approx(estimate.value + ENTROPY) and bound.value > EXACT


def test_an_excluded_demonstration_is_infinitely_far() -> None:
    assert kl_from_expert(torch.tensor([-1.0, -math.inf])).value == math.inf
    assert math.isnan(kl_from_expert(torch.tensor([-1.0])).standard_error)
    with pytest.raises(ValueError, match="no held-out demonstration"):
        kl_from_expert(torch.tensor([]))


def test_the_rule_bounds_what_is_lost() -> None:
    """The best policy at this temperature is at most epsilon worse than the expert."""
    reward = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64)
    for kl in (EXACT, EXACT + ENTROPY):
        beta = temperature_by_rule(0.1, kl)
        best = (CLONE.log() + reward / beta).softmax(dim=0)
        assert (EXPERT * reward).sum() - (best * reward).sum() <= 0.1
        assert beta * EXACT <= 0.1 + 1e-12
    assert temperature_by_rule(0.1, EXACT) == pytest.approx(0.1 / EXACT)


@pytest.mark.parametrize(
    ("epsilon", "kl", "message"),
    [
        (0.0, 1.0, "`epsilon=0.0` must be a positive"),
        (math.nan, 1.0, "must be a positive"),
        (0.1, math.inf, "give the clone a floor by `prior_demonstrations`"),
        (0.1, -0.5, "measured as -0.5, from which no `beta` follows: lower `expert_entropy`"),
    ],
)
def test_no_temperature(epsilon: float, kl: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        temperature_by_rule(epsilon, kl)
