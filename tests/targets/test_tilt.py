"""The tilt: phi = sum_k w_k r_k / beta."""

import math

import pytest
import torch

from trl_bayes.targets import Tilt


NAN = math.nan
NAMES = ["quality", "style"]
REWARDS = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 0.0]])


def test_phi_is_the_sum_of_rewards_over_beta() -> None:
    tilt = Tilt(beta=0.2)
    tilt.bind(NAMES)
    assert tilt.log_potential(REWARDS).tolist() == pytest.approx([-5.0, 17.5, 0.0])
    assert Tilt(beta=0.2).log_potential(REWARDS).tolist() == pytest.approx([-5.0, 17.5, 0.0])  # names are not needed


def test_weights_are_the_trainer_s() -> None:
    tilt = Tilt(beta=0.5)
    tilt.bind(NAMES, torch.tensor([2.0, -1.0]))
    assert tilt.log_potential(REWARDS).tolist() == pytest.approx([8.0, -4.0, 0.0])
    tilt = Tilt(beta=0.5, rewards="style")
    tilt.bind(NAMES, torch.tensor([2.0, -1.0]))
    assert tilt.log_potential(REWARDS).tolist() == pytest.approx([4.0, -6.0, 0.0])


def test_a_reward_that_does_not_apply_adds_nothing() -> None:
    tilt = Tilt(beta=0.5)
    tilt.bind(NAMES, torch.tensor([2.0, -1.0]))
    phi = tilt.log_potential(torch.tensor([[NAN, 3.0], [1.0, NAN], [NAN, NAN], [NAN, 0.0]]))
    assert phi.tolist() == pytest.approx([-6.0, 4.0, NAN, 0.0], nan_ok=True)


def test_a_finite_reward_that_overflows_counts_as_missing() -> None:
    """As an infinite one does in training: a sentinel such as the smallest float says nothing."""
    tilt = Tilt(beta=0.1)
    tilt.bind(["style"])
    phi = tilt.log_potential(torch.tensor([[torch.finfo(torch.float32).min], [3e38], [1.0]]))
    assert phi.tolist() == pytest.approx([NAN, NAN, 10.0], nan_ok=True)


def test_only_the_rewards_that_it_reads_can_leave_a_completion_out() -> None:
    tilt = Tilt(beta=1.0, rewards="style")
    tilt.bind(NAMES)
    phi = tilt.log_potential(torch.tensor([[NAN, 3.0], [1.0, NAN]]))
    assert phi.tolist() == pytest.approx([3.0, NAN], nan_ok=True)


def test_settings() -> None:
    assert Tilt(beta=1).settings() == {"beta": 1.0}
    assert repr(Tilt(beta=0.1)) == "Tilt(beta=0.1)"
    assert repr(Tilt(0.1, rewards=["style", "quality"])) == "Tilt(beta=0.1, rewards=['style', 'quality'])"
    assert not Tilt(0.1).hard


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, NAN])
def test_beta_refused(beta: float) -> None:
    with pytest.raises(ValueError) as error:
        Tilt(beta)
    assert str(error.value) == (f"`Tilt` needs a positive finite `beta` (the posterior's temperature), got {beta}.")
