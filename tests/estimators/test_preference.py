"""XPO's loss: its gradient is that of the paper's formula, summed over all pairs and labels of five outcomes."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.helpers.outcomes import LOG_POLICY, LOG_PRIOR, NUM_OUTCOMES, OTHER_PROPOSAL, THETA, vector
from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import PairTerms, Preference, PreferenceLoss, bradley_terry, larger_wins


BETA = 0.7
REWARDS = vector(0.6, -1.2, 0.3, 1.5, 0.3)  # two tie
PAIRS = torch.tensor(list(itertools.product(range(NUM_OUTCOMES), repeat=2)))  # (M, 2), y and y~
PROBABILITY = (OTHER_PROPOSAL[PAIRS[:, 0]] + LOG_PRIOR[PAIRS[:, 1]]).exp()  # y of an earlier policy, y~ of the prior
ORDERINGS = {"bradley_terry": bradley_terry, "larger_reward": larger_wins}


def terms(ordering: str = "bradley_terry") -> PairTerms:
    own, others = REWARDS[PAIRS].unbind(dim=1)
    usable = torch.ones(len(PAIRS), dtype=torch.bool)
    return PairTerms(LOG_PRIOR[PAIRS], ORDERINGS[ordering](own, others), usable)


def scores(log_policy: Tensor = LOG_POLICY) -> Tensor:
    """`grad log pi(y)` of each outcome, a row each."""
    return torch.eye(NUM_OUTCOMES, dtype=torch.float64) - log_policy.exp()


def expected_gradient(loss: PreferenceLoss, alpha: float, ordering: str, log_policy: Tensor = LOG_POLICY) -> Tensor:
    factors = loss.factors(log_policy[PAIRS], terms(ordering), alpha)  # (M, 2)
    return (PROBABILITY.unsqueeze(1) * factors).flatten() @ scores(log_policy)[PAIRS.flatten()]


def label_probability(ordering: str, y: int, other: int) -> float:
    difference = (REWARDS[y] - REWARDS[other]).item()
    if ordering == "bradley_terry":
        return 1 / (1 + math.exp(-difference))
    return 0.5 if difference == 0 else float(difference > 0)


def by_the_paper(loss_type: str, alpha: float, ordering: str) -> Tensor:
    """Autograd through the formula, for both labels that a pair can get."""
    theta = THETA.clone().requires_grad_()
    log_pi = theta.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for y, other in itertools.product(range(NUM_OUTCOMES), repeat=2):
        drawn = (OTHER_PROPOSAL[y] + LOG_PRIOR[other]).exp()
        first_wins = label_probability(ordering, y, other)
        for label, chosen, rejected in ((first_wins, y, other), (1 - first_wins, other, y)):
            h = (log_pi[chosen] - LOG_PRIOR[chosen]) - (log_pi[rejected] - LOG_PRIOR[rejected])
            of_pair = -logsigmoid(BETA * h) if loss_type == "sigmoid" else (h - 1 / (2 * BETA)) ** 2
            total = total + drawn * label * (of_pair + alpha * log_pi[other])
    return torch.autograd.grad(total, theta)[0]


@pytest.mark.parametrize("ordering", ORDERINGS)
@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_gradient_is_the_formula_s(loss_type: str, alpha: float, ordering: str) -> None:
    loss = PreferenceLoss(BETA, loss_type)
    expected = by_the_paper(loss_type, alpha, ordering)
    assert expected.norm() > 1e-2
    torch.testing.assert_close(expected_gradient(loss, alpha, ordering), expected, rtol=0, atol=1e-6)

    theta = THETA.clone().requires_grad_()  # and what the loss gives to autograd
    parts = loss.losses(theta.log_softmax(0)[PAIRS], terms(ordering), alpha)
    (given,) = torch.autograd.grad((PROBABILITY * (parts[0] + parts[1])).sum(), theta)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)


def test_fixed_point_is_the_tilt_where_labels_are_bradley_terry_s() -> None:
    tilt = (LOG_PRIOR + REWARDS / BETA).log_softmax(0)
    loss = PreferenceLoss(BETA)
    assert expected_gradient(loss, 0.0, "bradley_terry", tilt).abs().max() < 1e-12
    assert expected_gradient(loss, 0.4, "bradley_terry", tilt).abs().max() > 1e-2  # the bonus moves it
    # If the larger reward wins for certain, more is always better: the tilt would still be sharpened
    assert expected_gradient(loss, 0.0, "larger_reward", tilt) @ (REWARDS - REWARDS.mean()) < -1e-3


def test_bonus_has_no_gradient_at_the_prior() -> None:
    """For a table of logits it is `alpha (pi_0 - pi)`: nothing to start from where training starts."""
    alpha = 0.4
    for log_policy in (LOG_PRIOR, LOG_POLICY):
        with_bonus, without = (
            expected_gradient(PreferenceLoss(BETA), a, "bradley_terry", log_policy) for a in (alpha, 0.0)
        )
        expected = alpha * (LOG_PRIOR.exp() - log_policy.exp())
        torch.testing.assert_close(with_bonus - without, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_extreme_ratios_and_pairs_that_do_not_count(loss_type: str) -> None:
    log_policy = torch.tensor([[-1e4, -1.0], [-1.0, -1e4], [-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    usable = torch.tensor([True, True, False])
    pairs = PairTerms(-torch.ones(3, 2, dtype=torch.float64), vector(1.0, 1.0, 0.5), usable)
    loss = PreferenceLoss(BETA, loss_type)
    preferred, bonus = loss.losses(log_policy, pairs, alpha=0.1)
    (gradient,) = torch.autograd.grad((preferred + bonus).sum(), log_policy)
    assert preferred.isfinite().all() and gradient.isfinite().all()
    assert preferred[2] == bonus[2] == 0 and (gradient[2] == 0).all()
    torch.testing.assert_close(loss.factors(log_policy.detach(), pairs, alpha=0.1), gradient)


def test_a_tie_is_even() -> None:
    assert larger_wins(vector(1.0, 0.0, 2.0), vector(1.0, 1.0, 1.0)).tolist() == [0.5, 0.0, 1.0]


def test_says_what_it_minimizes() -> None:
    estimator = Preference(get_divergence("reverse_kl"), PreferenceLoss(BETA, "ipo"))
    assert estimator.objective == "the XPO loss of preferences (`ipo`)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.1, "loss_type": "dapo"}, "Unknown `loss_type='dapo'`: use one of"),
        ({"beta": 0.0}, "`beta=0.0` is not a temperature"),
        ({"beta": math.nan}, "`beta=nan` is not a temperature"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(**arguments)
