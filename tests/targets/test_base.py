"""What all targets share: binding reward names to columns, weights, settings, state."""

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
    Context,
    LogPotentialError,
    LogSigmoidCentered,
    Moments,
    Product,
    Target,
    Tempered,
    Tilt,
    identity,
)


NAN = math.nan
NAMES = ["quality", "compiles", "length"]
REWARDS = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, 6.0]])


class First(Target):
    """The smallest target: what a user's own looks like."""

    def log_potential(self, rewards: Tensor) -> Tensor:
        return self.select(rewards)[:, 0]


def test_a_target_of_ones_own() -> None:
    target = First(rewards="length")
    target.bind(NAMES)
    assert target.log_potential(REWARDS).tolist() == [3.0, 6.0]
    assert repr(target) == "First(rewards=['length'])"
    assert not target.hard
    assert target.state_dict() == {}
    target.load_state_dict({})


class PerPrompt(Target):
    """A target that depends on the prompt: the reward above the prompt's key."""

    needs_context = True

    def log_potential(self, rewards: Tensor, context: Context | None = None) -> Tensor:
        return rewards[:, 0] - self.require_context(context).prompt_key


def test_only_a_target_that_needs_its_context_gets_it() -> None:
    context = Context(torch.zeros(2), torch.tensor([1, 3]))
    assert PerPrompt()(REWARDS, context).tolist() == [0.0, 1.0]
    assert First()(REWARDS, context).tolist() == First()(REWARDS).tolist() == [1.0, 4.0]
    with pytest.raises(
        ValueError, match="^PerPrompt needs to know the prompts and the prior's probabilities: call it"
    ):
        PerPrompt()(REWARDS)


class Changed(Target):
    """The first reward, changed by a function."""

    def __init__(self, change: Callable[[Tensor], Any]):
        super().__init__()
        self.change = change

    def log_potential(self, rewards: Tensor) -> Tensor:
        return self.change(rewards[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda phi: phi.unsqueeze(1), r"returned (2, 1) as log-potential: return one value per completion, a tensor"),
        (
            lambda phi: phi[:1],
            r"returned (1,) as log-potential: return one value per completion, a tensor of shape (2,)",
        ),
        (lambda phi: phi.sum(), r"returned () as log-potential"),
        (lambda phi: phi.tolist(), "returned list as log-potential"),
        (lambda phi: None, "returned NoneType as log-potential"),
        (lambda phi: phi + torch.inf, "returned +inf as log-potential, which no posterior can have: bound it."),
        (lambda phi: torch.tensor([NAN, math.inf]), "returned +inf as log-potential"),
    ],
)
def test_what_no_log_potential_can_be(change: Callable[[Tensor], Any], message: str) -> None:
    """Refused by whoever calls the target, and in a product under the name of the factor."""
    for target in (Changed(change), Product([Tilt(1.0), Changed(change)])):
        with pytest.raises(LogPotentialError) as error:
            target(REWARDS)
        assert str(error.value).startswith(f"The target Changed() {message}")
        assert "\n" not in str(error.value)


def test_what_a_log_potential_can_be() -> None:
    """-inf is for the caller to judge, who knows the divergence."""
    values = torch.tensor([-math.inf, NAN])
    assert torch.equal(Changed(lambda phi: values)(REWARDS).isnan(), values.isnan())
    assert Changed(lambda phi: phi)(REWARDS[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("target", "bound"),
    [
        (First(), None),
        (Tilt(1.0), None),
        (Constraint(), 0.0),
        (LogSigmoidCentered(), 0.0),
        (Tempered(1.0), 0.0),
        (Tempered(2.0), 0.0),
        (Tempered(0.5), None),
        (Moments({"quality": 0.5}), None),
        (ChiSquared(1.0), None),
        (Calibrated(identity(), 1.0), None),  # until it is fitted
        (Product([Constraint(), Tempered(1.5)]), 0.0),
        (Product([Product([Constraint()]), LogSigmoidCentered()]), 0.0),
        (Product([Constraint(), Tilt(1.0)]), None),
    ],
    ids=repr,
)
def test_bound_of_phi(target: Target, bound: float | None) -> None:
    assert target.max_log_potential() == bound


class Below(First):
    def __init__(self, bound: float):
        super().__init__()
        self.bound = bound

    def max_log_potential(self) -> float:
        return self.bound


def test_bound_of_a_product_of_bounds_that_are_not_zero() -> None:
    """A factor without a reward for a completion adds 0 to it, so a negative bound does not lower the sum."""
    assert Product([Below(2.0), Below(0.5)]).max_log_potential() == 2.5
    assert Product([Below(2.0), Below(-1.0)]).max_log_potential() == 2.0
    assert Product([Below(-1.0)]).max_log_potential() == -1.0


def test_a_target_that_learns_nothing() -> None:
    target = First()
    assert target.is_fitted
    target.require_fitted()
    assert target.log_z(torch.tensor([1])) is None
    assert target.diagnostics() == {}


def test_weighted_sum() -> None:
    target = First(["quality", "compiles"])
    target.bind(NAMES, torch.tensor([0.5, 2.0, 3.0]))
    rewards = torch.cat([REWARDS, torch.full((1, 3), NAN)])
    assert target.weighted_sum(rewards).tolist() == pytest.approx([4.5, 2.0, NAN], nan_ok=True)
    assert target.weighted_sum(rewards).dtype == torch.float32


def test_a_target_must_say_what_its_log_potential_is() -> None:
    with pytest.raises(TypeError, match="log_potential"):
        Target()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("rewards", "columns"),
    [("compiles", [1]), (["length", "quality"], [2, 0]), (("quality",), [0]), (None, [0, 1, 2])],
)
def test_rewards_are_selected_by_name(rewards: str | list[str] | None, columns: list[int]) -> None:
    """In the order of the names, wherever their columns are."""
    target = First(rewards)
    target.bind(NAMES)
    torch.testing.assert_close(target.select(REWARDS), REWARDS[:, columns], equal_nan=True)
    assert target.select_weights(REWARDS).tolist() == [1.0] * len(columns)
    target.bind(NAMES, torch.tensor([0.5, 2.0, 3.0]))
    assert target.select_weights(REWARDS).tolist() == [[0.5, 2.0, 3.0][column] for column in columns]


def test_weights_have_the_type_of_the_rewards() -> None:
    target = First()
    target.bind(NAMES, torch.tensor([0.5, 2.0, 3.0]))
    assert target.select_weights(REWARDS.double()).dtype == torch.float64
    assert First().select_weights(REWARDS.double()).dtype == torch.float64


def test_a_target_that_reads_all_rewards_needs_no_names() -> None:
    target = First()
    assert target.rewards is None
    assert target.select(REWARDS) is REWARDS
    assert target.select_weights(REWARDS).tolist() == [1.0, 1.0, 1.0]


def test_a_target_may_be_bound_again() -> None:
    target = First("length")
    target.bind(NAMES)
    target.bind(["length", "other"], torch.tensor([7.0, 8.0]))
    assert target.select(REWARDS).tolist() == [[1.0], [4.0]]
    assert target.select_weights(REWARDS).tolist() == [7.0]


def test_the_caller_s_list_of_names_is_copied() -> None:
    names = ["length"]
    target = First(names)
    names.append("quality")
    assert target.rewards == ["length"]


@pytest.mark.parametrize("target", [Tilt(1.0, rewards="toxicity"), Constraint(rewards=["quality", "toxicity"])])
def test_a_reward_that_is_not_there(target: Target) -> None:
    with pytest.raises(ValueError) as error:
        target.bind(NAMES)
    assert str(error.value) == (
        f"The target {type(target).__name__} reads the reward 'toxicity', but the reward functions are "
        "['quality', 'compiles', 'length']: use one of these names."
    )


def test_reading_by_name_before_the_names_are_known() -> None:
    with pytest.raises(ValueError, match=r"^Call `bind\(reward_names\)` first: Tilt reads rewards by name\.$"):
        Tilt(1.0, rewards="quality").log_potential(REWARDS)


def test_reading_no_reward() -> None:
    with pytest.raises(
        ValueError, match=r"^`Constraint\(rewards=\[\]\)` reads no reward: name at least one, or leave"
    ):
        Constraint(rewards=[])
