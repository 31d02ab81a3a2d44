"""The constraint: phi = log 1[every feature holds]."""

import math

import pytest
import torch

from trl_bayes.targets import Constraint


INF, NAN = math.inf, math.nan
NAMES = ["compiles", "short"]


def test_every_feature_must_hold() -> None:
    constraint = Constraint()
    constraint.bind(NAMES)
    rewards = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.5, 7.0], [0.49, 1.0]])
    assert constraint.log_potential(rewards).tolist() == [0.0, -INF, -INF, 0.0, -INF]


def test_threshold_is_the_least_that_holds() -> None:
    rewards = torch.tensor([[2.0], [1.99], [-5.0]])
    assert Constraint(threshold=2).log_potential(rewards).tolist() == [0.0, -INF, -INF]
    assert Constraint(threshold=-5.0).log_potential(rewards).tolist() == [0.0, 0.0, 0.0]


def test_only_the_named_features_count() -> None:
    constraint = Constraint(rewards="short")
    constraint.bind(NAMES)
    assert constraint.log_potential(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).tolist() == [0.0, -INF]


def test_of_weights_only_zero_matters() -> None:
    """As in TRL a reward of weight 0 is only logged, unless the target names it."""
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    for weights, expected in ([2.0, -3.0], [0.0, -INF]), ([0.0, 1.0], [0.0, 0.0]), ([0.0, 0.0], [0.0, -INF]):
        constraint = Constraint()
        constraint.bind(NAMES, torch.tensor(weights))
        assert constraint.log_potential(rewards).tolist() == expected
    named = Constraint(rewards=NAMES)
    named.bind(NAMES, torch.tensor([0.0, 1.0]))
    assert named.log_potential(rewards).tolist() == [0.0, -INF]


def test_a_feature_that_does_not_apply_cannot_fail() -> None:
    rewards = torch.tensor([[NAN, 1.0], [0.0, NAN], [NAN, NAN]])
    assert Constraint().log_potential(rewards).tolist() == pytest.approx([0.0, -INF, NAN], nan_ok=True)


def test_settings() -> None:
    assert Constraint().hard
    assert repr(Constraint()) == "Constraint(threshold=0.5)"
    assert repr(Constraint("short", threshold=1)) == "Constraint(threshold=1.0, rewards=['short'])"


@pytest.mark.parametrize("threshold", [INF, -INF, NAN])
def test_threshold_refused(threshold: float) -> None:
    with pytest.raises(ValueError) as error:
        Constraint(threshold=threshold)
    assert str(error.value) == f"`Constraint` needs a finite `threshold`, got {threshold}."
