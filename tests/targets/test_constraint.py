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


def test_weights_do_not_matter() -> None:
    constraint = Constraint()
    constraint.bind(NAMES, torch.tensor([0.0, -3.0]))
    assert constraint.log_potential(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist() == [0.0, -INF]


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
