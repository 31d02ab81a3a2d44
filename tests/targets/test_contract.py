"""The contract check: every target of the package keeps it, and each way to break it is named."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_bayes.targets import (
    Calibrated,
    ChiSquared,
    Constraint,
    LogSigmoidCentered,
    Moments,
    PriorScores,
    Product,
    Target,
    Tempered,
    Tilt,
    assert_target_contract,
    best_of_n,
    ctrl_best_of_n,
    ctrl_worst_of_n,
)


def everything() -> list[Target]:
    return [
        Tilt(0.1),
        Constraint(),
        Constraint("a", threshold=-1.0),
        Moments({"a": 0.4, "b": -0.1}),
        Calibrated(best_of_n(4)),
        Calibrated(ctrl_best_of_n(), beta=7000.0, rewards="b"),
        Calibrated(ctrl_worst_of_n(5), beta=0.1),
        LogSigmoidCentered(["a", "b"], gamma=0.1, quantile=0.5),
        Tempered(0.5),
        ChiSquared(0.2, rewards="a"),
        Product([Constraint("a", threshold=-1.0), Moments({"b": 0.1}), Tempered(1.1), Tilt(2.0, rewards="a")]),
        Product([Calibrated(best_of_n(2)), ChiSquared(2.0), LogSigmoidCentered(), Product([Moments({"a": 0.5})])]),
        Product([Tempered(1.1), Tempered(1.2)]),
    ]


@pytest.mark.parametrize("target", everything(), ids=repr)
def test_kept_by_every_target(target: Target, enumerated: Any) -> None:
    before = repr(target)
    assert_target_contract(target, ["a", "b"])
    # on tied rewards too, which make phi = -inf and some prompts without evidence
    rewards = torch.stack([enumerated.feature("a"), enumerated.feature("b") - 0.5], dim=1)
    if not isinstance(target, Calibrated):  # it warns of ties, once
        assert_target_contract(target, ["a", "b"], prior=enumerated.sample(rewards, 200, seed=0))
    assert repr(target) == before
    assert target.is_fitted == (not target.needs_prior_samples)  # a copy was fitted


def test_names_default_to_those_that_are_read() -> None:
    assert_target_contract(Tilt(1.0))
    assert_target_contract(Product([Tilt(1.0, rewards="x"), Product([Constraint("y"), Tilt(1.0, rewards="x")])]))


class Broken(Target):
    """The first reward, changed by a function."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda phi: phi):
        super().__init__()
        self.change = change

    def log_potential(self, rewards: Tensor) -> Tensor:
        return self.change(rewards[:, 0])


def in_place(phi: Tensor) -> Tensor:
    return phi.add_(1.0)


def counting() -> Callable[[Tensor], Tensor]:
    calls: list[int] = []

    def change(phi: Tensor) -> Tensor:
        calls.append(1)
        return phi + len(calls)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda phi: phi.tolist(), "returned list as log-potential: return one value per completion"),
        (lambda phi: phi.unsqueeze(1), r"returned \(768, 1\) as log-potential: .* of shape \(768,\)"),
        (lambda phi: phi.double(), "it returns torch.float64 for rewards of torch.float32"),
        (lambda phi: -phi.log().abs().masked_fill(phi.isnan(), math.nan), "NaN, which means 'not scored'"),
        (
            lambda phi: phi.masked_fill(phi > 1, math.inf),
            "returned .inf as log-potential, which no posterior can have",
        ),
        (lambda phi: phi.masked_fill(phi < 0, -math.inf), "it returns -inf: set `hard = True`, or bound it"),
        (lambda phi: phi.nan_to_num(0.0), "a completion without any reward must have NaN"),
        (lambda phi: phi - phi.nan_to_num().mean(), "a completion in a smaller batch has another value"),
        (lambda phi: phi + torch.arange(len(phi)), "a completion in another order has another value"),
        (in_place, "it changes the rewards that it is given"),
        (counting(), "a second call gives other values"),
    ],
)
def test_broken_evidence(change: Callable[[Tensor], Any], message: str) -> None:
    assert_target_contract(Broken())
    with pytest.raises(AssertionError, match=message):
        assert_target_contract(Broken(change))


class TooLow(Broken):
    def max_log_potential(self) -> float:
        return 1.0


def test_broken_bound() -> None:
    with pytest.raises(AssertionError, match=r"it returns .*, above its `max_log_potential` of 1"):
        assert_target_contract(TooLow())


class ReadsThem(Broken):
    reads_rewards = False


def test_broken_declaration() -> None:
    with pytest.raises(AssertionError, match="it depends on rewards, although `reads_rewards` is False"):
        assert_target_contract(ReadsThem())


class Learner(Broken):
    """Subtracts the prior's mean; subclasses forget something."""

    needs_prior_samples = True
    mean: float | None = None

    def log_potential(self, rewards: Tensor) -> Tensor:
        return rewards[:, 0] - (self.mean or 0.0)

    def fit(self, prior: PriorScores) -> None:
        self.mean = prior.rewards.nanmean().item()

    @property
    def is_fitted(self) -> bool:
        return self.mean is not None

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


class NotFitted(Learner):
    is_fitted = False  # type: ignore[assignment]


class ForgetsState(Learner):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = 0.0


class RestoresNothing(Learner):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class ForgetsDiagnostics(Learner):
    steps = 0

    def fit(self, prior: PriorScores) -> None:
        super().fit(prior)
        self.steps = 3

    def diagnostics(self) -> dict[str, float]:
        return {"steps": self.steps}


class Address(Learner):
    def settings(self) -> dict[str, Any]:
        return {"change": self.change}


class SettingsChange(Learner):
    def settings(self) -> dict[str, Any]:
        return {"mean": self.mean}


class ShortPartition(Learner):
    def log_z(self, keys: Tensor) -> Tensor:
        return torch.zeros(1)


class InfinitePartition(Learner):
    def log_z(self, keys: Tensor) -> Tensor:
        return torch.full(keys.shape, -math.inf)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (NotFitted, "`is_fitted` is False after `fit`"),
        (RestoresNothing, "`is_fitted` is False after `load_state_dict`"),
        (ForgetsState, "restored from its `state_dict` it gives other values"),
        (ForgetsDiagnostics, "restored from its `state_dict` it has other diagnostics"),
        (Address, "its `repr` has an address and so differs between runs"),
        (SettingsChange, "its `repr` changed with use"),
        (ShortPartition, r"`log_z` returns \(1,\), not one per prompt"),
        (InfinitePartition, "`log_z` is not finite"),
    ],
)
def test_broken_learning(target: type[Learner], message: str) -> None:
    assert_target_contract(Learner())
    with pytest.raises(AssertionError, match=message):
        assert_target_contract(target())
