"""Estimators, each against the sum over *all* groups of a space of five outcomes: no sampling, no noise to tolerate.

The space and the sums are in `tests/helpers/outcomes.py`.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.outcomes import (
    INF,
    LOG_POLICY,
    LOG_PRIOR,
    NUM_OUTCOMES,
    ONE,
    OTHER_PROPOSAL,
    PROPOSALS,
    SOFT,
    SPACES,
    TEXTBOOK,
    ZERO,
    Space,
    all_groups,
    all_multisets,
    coefficient_of,
    divergence_of,
    everything_valid,
    exact_gradient,
    expected_gradient,
    f_divergence,
    forward_kl,
    group_gradient,
    reverse_kl,
    vector,
)
from trl_bayes.divergences import DIVERGENCES, Divergence
from trl_bayes.estimators import (
    Estimator,
    ImportanceWeights,
    PolicyGradient,
    PureRL,
    ScoreFunction,
    Sequences,
    TrajectoryBalance,
    leave_one_out_baseline,
    leave_one_out_mean,
    vargrad_log_z,
)
from trl_bayes.groups import (
    Group,
    bounded_leave_one_out_log_z,
    effective_sample_size,
    leave_one_out_log_z,
    pooled_log_z,
)
from trl_bayes.partitions import fixed_log_z


DPG = ImportanceWeights(divergence_of("forward_kl"))


def test_every_divergence_is_enumerated() -> None:
    assert {name.partition("=")[0] for name in TEXTBOOK} == set(DIVERGENCES)


every_divergence = pytest.mark.parametrize("name", TEXTBOOK)
both_proposals = pytest.mark.parametrize("log_q", PROPOSALS.values(), ids=PROPOSALS)
# A divergence that is infinite outside the support has no gradient to compare with
divergence_and_space = pytest.mark.parametrize(
    ("name", "where"),
    [(name, where) for name in TEXTBOOK for where in SPACES if where == "soft" or TEXTBOOK[name][1] < INF],
)


def assert_equal(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected.broadcast_to(actual.shape), atol=atol, rtol=0)


def for_all(**strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], Any]:
    """A property over the strategies; no deadline, for a loaded machine is not a failure."""
    return lambda test: settings(deadline=None, max_examples=60, derandomize=True)(given(**strategies)(test))


# --- the enumeration itself ----------------------------------------------------------------------------------------


@both_proposals
def test_enumerations_are_complete(log_q: Tensor) -> None:
    for group_size in (2, 3, 4):
        assert_equal(all_groups(group_size, log_q).probability.sum(), ONE)
    for group_size in (4, 8, 16):
        assert_equal(all_multisets(group_size, log_q).probability.sum(), ONE)


# --- exact gradients, with log Z known -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "name", "log_q"),
    [
        (PolicyGradient, "reverse_kl", LOG_POLICY),
        (PolicyGradient, "reverse_kl", OTHER_PROPOSAL),
        (ScoreFunction, "jensen_shannon", LOG_POLICY),
        (ScoreFunction, "jensen_shannon", OTHER_PROPOSAL),
        (ImportanceWeights, "forward_kl", LOG_POLICY),
        (ImportanceWeights, "forward_kl", OTHER_PROPOSAL),
        (TrajectoryBalance, "squared_hellinger", LOG_POLICY),  # off-policy it is another loss with the same optimum
    ],
)
def test_mean_of_each_estimator_is_the_gradient(
    estimator: Callable[[Divergence], Estimator], name: str, log_q: Tensor
) -> None:
    gradient = expected_gradient(estimator(divergence_of(name)), SOFT, log_q)
    assert_equal(gradient, exact_gradient(f_divergence(name, SOFT)))


def expected_score_function_gradient(name: str, target: Space, log_q: Tensor, group_size: int) -> Tensor:
    groups = all_groups(group_size, log_q)
    y, valid, divergence = groups.outcomes, everything_valid(groups.outcomes), divergence_of(name)
    pi, log_p, log_z = LOG_POLICY[y], target.log_target[y], target.log_z.expand(y.shape)
    baseline = leave_one_out_baseline(pi - log_p, log_z, valid, divergence)
    coefficient = coefficient_of(ScoreFunction(divergence), pi, log_p, log_q[y], log_z, baseline)
    return groups.expectation(group_gradient(coefficient, y))


@pytest.mark.parametrize("group_size", [2, 3, 4])
@both_proposals
@divergence_and_space
def test_score_function_gradient_is_exact(name: str, where: str, log_q: Tensor, group_size: int) -> None:
    exact = exact_gradient(f_divergence(name, SPACES[where]))
    assert exact.norm() > 0.05, "nothing to estimate"
    assert_equal(expected_score_function_gradient(name, SPACES[where], log_q, group_size), exact)


@pytest.mark.parametrize("group_size", [2, 3, 4])
@pytest.mark.parametrize("where", SPACES)
@both_proposals
def test_importance_gradient_is_exact(where: str, log_q: Tensor, group_size: int) -> None:
    target, groups = SPACES[where], all_groups(group_size, log_q)
    y = groups.outcomes
    coefficient = coefficient_of(DPG, LOG_POLICY[y], target.log_target[y], log_q[y], target.log_z.expand(y.shape))
    exact = exact_gradient(forward_kl(target))
    assert_equal(groups.expectation(group_gradient(coefficient, y)), exact)
    # The second weight, pi/q, has no part in the mean; it is there for the variance
    without = coefficient - (LOG_POLICY[y] - log_q[y]).exp()
    assert_equal(groups.expectation(group_gradient(without, y)), exact)


@pytest.mark.parametrize("group_size", [2, 3, 4])
@divergence_and_space
def test_trajectory_balance_gradient_is_exact_on_policy(name: str, where: str, group_size: int) -> None:
    target, groups = SPACES[where], all_groups(group_size, LOG_POLICY)
    y = groups.outcomes
    coefficient = coefficient_of(
        TrajectoryBalance(divergence_of(name)),
        LOG_POLICY[y],
        target.log_target[y],
        LOG_POLICY[y],
        target.log_z.expand(y.shape),
    )
    exact = exact_gradient(f_divergence(name, target))
    assert_equal(groups.expectation(group_gradient(coefficient, y)), exact)


@every_divergence
def test_trajectory_balance_vanishes_at_the_posterior_off_policy(name: str) -> None:
    """For any q: every coefficient is zero there, with the exact Z and with the one that is fitted to the group."""
    divergence = divergence_of(name)
    y = all_groups(3, OTHER_PROPOSAL).outcomes
    at_posterior, log_p = SOFT.log_posterior[y], SOFT.log_target[y]
    fitted = vargrad_log_z(at_posterior - log_p, everything_valid(y))
    assert_equal(fitted, SOFT.log_z, atol=1e-9)
    for log_z in (SOFT.log_z.expand(y.shape), fitted):
        coefficient = coefficient_of(TrajectoryBalance(divergence), at_posterior, log_p, OTHER_PROPOSAL[y], log_z)
        if (
            name == "total_variation"
        ):  # sign(t - 1) / 2 is not small where rounding has left t = 1 +- 1e-16: the loss is
            coefficient = divergence.loss(at_posterior - log_p + log_z)
        assert_equal(coefficient, ZERO, atol=1e-8)
    elsewhere = coefficient_of(
        TrajectoryBalance(divergence), LOG_POLICY[y], log_p, OTHER_PROPOSAL[y], SOFT.log_z.expand(y.shape)
    )
    assert elsewhere.abs().max() > 0.1


@pytest.mark.parametrize(
    "name", [name for name in TEXTBOOK if name != "total_variation"]
)  # its slope has a step there
@pytest.mark.parametrize("where", SPACES)
def test_estimates_have_no_variance_at_the_posterior(name: str, where: str) -> None:
    """On-policy at pi = p all weights are Z: t = 1 for every sample, and every coefficient is zero, Z unknown."""
    target, divergence = SPACES[where], divergence_of(name)
    supported = target.log_posterior.isfinite().nonzero().flatten()
    y = torch.tensor(list(itertools.product(supported.tolist(), repeat=3)))
    pi, log_p, valid = target.log_posterior[y], target.log_target[y], everything_valid(y)
    log_z = leave_one_out_log_z(log_p - pi, valid)
    assert_equal(log_z, target.log_z)
    baseline = leave_one_out_baseline(pi - log_p, log_z, valid, divergence)
    for coefficient in (
        coefficient_of(ScoreFunction(divergence), pi, log_p, pi, log_z, baseline),
        coefficient_of(DPG, pi, log_p, pi, log_z),
        coefficient_of(TrajectoryBalance(divergence), pi, log_p, pi, log_z),
    ):
        assert_equal(coefficient, ZERO)


# --- KL-RL: no Z at all --------------------------------------------------------------------------------------------


def kl_rl_coefficient(outcomes: Tensor, log_q: Tensor) -> Tensor:
    """The trainer's own, with the baseline that it chooses."""
    estimator, phi = PolicyGradient(divergence_of("reverse_kl")), SOFT.log_target - LOG_PRIOR
    group = Group(*(values[outcomes] for values in (LOG_POLICY, log_q, LOG_PRIOR, phi)))
    no_z = torch.zeros_like(group.phi)
    baseline = estimator.baseline(group, no_z, group.valid)
    return estimator.coefficient(Sequences(group.log_policy, group.log_target, group.log_proposal, no_z, baseline))


@pytest.mark.parametrize("group_size", [2, 3, 4])
@both_proposals
def test_kl_rl_gradient_is_exact_without_evidence(log_q: Tensor, group_size: int) -> None:
    groups = all_groups(group_size, log_q)
    gradient = groups.expectation(group_gradient(kl_rl_coefficient(groups.outcomes, log_q), groups.outcomes))
    assert_equal(gradient, exact_gradient(reverse_kl(SOFT)))


def test_the_value_of_pure_rl_is_of_the_current_policy_whoever_drew() -> None:
    """As the gradient is: `-E_pi[phi]`, from completions of another policy."""
    phi, zeros = LOG_POLICY - OTHER_PROPOSAL, torch.zeros_like(LOG_POLICY)
    value = PureRL(divergence_of("reverse_kl")).value(Sequences(LOG_POLICY, phi, OTHER_PROPOSAL, zeros, zeros))
    expected = -(LOG_POLICY.exp() * phi).sum()
    torch.testing.assert_close((OTHER_PROPOSAL.exp() * value).sum(), expected)
    assert abs(expected + (OTHER_PROPOSAL.exp() * phi).sum()) > 0.1  # the drawing policy's is another


def test_kl_rl_advantages_are_rloo_over_beta() -> None:
    beta = 0.7
    rewards = beta * (SOFT.log_target - LOG_PRIOR)
    y = all_groups(4, LOG_POLICY).outcomes
    penalized = (
        rewards[y] - beta * (LOG_POLICY - LOG_PRIOR)[y]
    )  # RLOO: the reward less beta times the summed log-ratio
    siblings = torch.stack([torch.cat([penalized[:, :i], penalized[:, i + 1 :]], dim=1).mean(dim=1) for i in range(4)])
    rloo = penalized - siblings.T
    assert rloo.abs().max() > 0.5
    assert_equal(-kl_rl_coefficient(y, LOG_POLICY), rloo / beta)


@both_proposals
def test_kl_rl_is_the_reverse_kl_score_function_for_any_common_evidence(log_q: Tensor) -> None:
    y, divergence = all_groups(3, log_q).outcomes, divergence_of("reverse_kl")
    pi, log_p, log_z = LOG_POLICY[y], SOFT.log_target[y], vector(17.0)
    baseline = leave_one_out_baseline(pi - log_p, log_z.expand_as(pi), everything_valid(y), divergence)
    coefficient = coefficient_of(ScoreFunction(divergence), pi, log_p, log_q[y], log_z, baseline)
    assert_equal(coefficient, kl_rl_coefficient(y, log_q))


# --- bias of the gradient, with Z from the siblings ----------------------------------------------------------------


LogZRule = Callable[[Tensor, Tensor], Tensor]


def coefficient_with_estimated_evidence(
    estimator: str, outcomes: Tensor, target: Space, rule: LogZRule = bounded_leave_one_out_log_z
) -> Tensor:
    """On-policy, as the trainers compute it; a group without evidence gives nothing."""
    pi, log_p, valid = LOG_POLICY[outcomes], target.log_target[outcomes], everything_valid(outcomes)
    method, _, name = estimator.partition(":")
    log_z = rule(log_p - pi, valid)
    usable = log_z.isfinite()
    log_z = log_z.masked_fill(~usable, 0.0)
    if method == "dpg":
        return coefficient_of(DPG, pi, log_p, pi, log_z).masked_fill(~usable, 0.0)
    divergence = divergence_of(name)
    if method == "tb":
        return coefficient_of(TrajectoryBalance(divergence), pi, log_p, pi, log_z).masked_fill(~usable, 0.0)
    baseline = leave_one_out_baseline(pi - log_p, log_z, usable, divergence)
    return coefficient_of(ScoreFunction(divergence), pi, log_p, pi, log_z, baseline).masked_fill(~usable, 0.0)


def relative_bias(
    estimator: str, where: str, group_size: int, rule: LogZRule = bounded_leave_one_out_log_z
) -> tuple[float, float]:
    """`|E[estimate] - exact| / |exact|`, and the cosine of `E[estimate]` with the exact gradient."""
    groups, target, name = all_multisets(group_size, LOG_POLICY), SPACES[where], estimator.partition(":")[2]
    exact = exact_gradient(f_divergence(name, target) if name else forward_kl(target))
    coefficient = coefficient_with_estimated_evidence(estimator, groups.outcomes, target, rule)
    mean = groups.expectation(group_gradient(coefficient, groups.outcomes))
    return ((mean - exact).norm() / exact.norm()).item(), torch.cosine_similarity(mean, exact, dim=0).item()


BIAS = {
    ("f_dpg:jensen_shannon", "soft"): (0.0213, 0.0100, 0.0048),
    ("f_dpg:jensen_shannon", "hard"): (0.0693, 0.0260, 0.0117),
    ("f_dpg:forward_kl", "soft"): (0.0683, 0.0397, 0.0189),
    ("f_dpg:forward_kl", "hard"): (0.0989, 0.0677, 0.0307),
    ("dpg", "soft"): (0.0767, 0.0396, 0.0189),
    ("dpg", "hard"): (0.1007, 0.0664, 0.0307),
}


@pytest.mark.parametrize(("estimator", "where"), BIAS)
def test_bias_of_the_leave_one_out_evidence(estimator: str, where: str) -> None:
    """Relative to the exact gradient's norm, it falls like 1/G and lies along the gradient: the step's size, not its
    direction, so that the fixed point stays. For THETA and the two spaces of this file:

    | estimator          | target | G = 4 | G = 8 | G = 16 |
    |--------------------|--------|-------|-------|--------|
    | f-DPG, JS          | soft   | .0213 | .0100 | .0048  |
    | f-DPG, JS          | hard   | .0693 | .0260 | .0117  |
    | f-DPG, forward KL  | soft   | .0683 | .0397 | .0189  |
    | f-DPG, forward KL  | hard   | .0989 | .0677 | .0307  |
    | DPG                | soft   | .0767 | .0396 | .0189  |
    | DPG                | hard   | .1007 | .0664 | .0307  |

    The baseline must use the sample's own leave-one-out Z for all siblings: with the siblings' Z, which contain the
    sample, the figures of the first row are .3645, .1551 and .0718.
    """
    figures = [relative_bias(estimator, where, group_size) for group_size in (4, 8, 16)]
    biases = [bias for bias, _ in figures]
    assert biases == pytest.approx(BIAS[estimator, where], abs=6e-5)
    assert all(1.4 < bias / half < 2.8 for bias, half in itertools.pairwise(biases))  # at 4 the bound acts often
    assert 1.9 < biases[1] / biases[2]
    assert all(cosine > 0.994 for _, cosine in figures)


@pytest.mark.parametrize("name", ["reverse_kl", "pearson_chi2"])
@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_leave_one_out_evidence_costs_nothing_where_the_slope_is_linear_in_it(name: str, group_size: int) -> None:
    """f'(t Z_hat / Z): reverse KL's baseline takes log Z_hat away, and Pearson's slope is unbiased as Z_hat is."""
    bias, _ = relative_bias(f"f_dpg:{name}", "soft", group_size, leave_one_out_log_z)
    assert bias < 1e-12


def test_multisets_give_the_same_bias_as_all_groups() -> None:
    groups = all_groups(4, LOG_POLICY)
    coefficient = coefficient_with_estimated_evidence("f_dpg:jensen_shannon", groups.outcomes, SOFT)
    exact = exact_gradient(f_divergence("jensen_shannon", SOFT))
    bias = groups.expectation(group_gradient(coefficient, groups.outcomes)) - exact
    expected, _ = relative_bias("f_dpg:jensen_shannon", "soft", 4)
    assert bias.norm().item() / exact.norm().item() == pytest.approx(expected, rel=1e-9)


# --- the evidence --------------------------------------------------------------------------------------------------


@both_proposals
@pytest.mark.parametrize("where", SPACES)
def test_log_z_is_unbiased_for_z(where: str, log_q: Tensor) -> None:
    target, groups = SPACES[where], all_groups(3, log_q)
    weights = (target.log_target - log_q)[groups.outcomes]
    valid = everything_valid(groups.outcomes)
    # The number of samples is an int tensor, whose logarithm is float32
    assert_equal(groups.expectation(pooled_log_z(weights, valid).exp()), target.log_z.exp(), atol=1e-7)
    valid[:, 0] = False  # two samples are enough
    assert_equal(groups.expectation(pooled_log_z(weights, valid).exp()), target.log_z.exp(), atol=1e-7)


@both_proposals
def test_leave_one_out_is_unbiased_for_z_whatever_the_sample_is(log_q: Tensor) -> None:
    """Independent of y_i: given y_i its expectation is Z, which is what makes w_i / Z_hat harmless."""
    groups = all_groups(3, log_q)
    weights = (SOFT.log_target - log_q)[groups.outcomes]
    z = leave_one_out_log_z(weights, everything_valid(groups.outcomes)).exp()
    for sample in range(3):
        for outcome in range(NUM_OUTCOMES):
            given_outcome = groups.outcomes[:, sample] == outcome
            probability = groups.probability * given_outcome / log_q[outcome].exp()
            assert_equal((probability * z[:, sample]).sum(), SOFT.log_z.exp())


def test_leave_one_out_is_the_mean_of_the_others_and_the_past() -> None:
    weights = vector(0.2, -1.0, 1.3, 0.6).unsqueeze(0)
    valid = torch.tensor([[True, True, False, True]])
    w = weights[0].exp().tolist()
    others = [[1, 3], [0, 3], [0, 1, 3], [0, 1]]  # an invalid sample has three valid siblings
    plain = leave_one_out_log_z(weights, valid).exp()[0].tolist()
    assert plain == pytest.approx([sum(w[j] for j in siblings) / len(siblings) for siblings in others])
    past_sum, past_count = 7.5, 9.0
    pooled = leave_one_out_log_z(weights, valid, vector(past_sum).log(), vector(past_count)).exp()[0].tolist()
    expected = [(past_sum + sum(w[j] for j in siblings)) / (past_count + len(siblings)) for siblings in others]
    assert pooled == pytest.approx(expected)
    no_past = leave_one_out_log_z(weights, valid, vector(-INF), vector(0.0)).exp()[0].tolist()
    assert no_past == pytest.approx(plain)


def test_leave_one_out_does_not_depend_on_the_sample_itself() -> None:
    weights = vector(0.2, -1.0, 1.3, 0.6).unsqueeze(0)
    jacobian = torch.autograd.functional.jacobian(
        lambda w: leave_one_out_log_z(w, everything_valid(w))[0], weights
    ).squeeze(1)  # (i, j): d log Z_{-i} / d log w_j
    assert_equal(jacobian.diagonal(), ZERO, atol=0)
    assert (jacobian + torch.eye(4) > 0.01).all()
    changed = weights + torch.tensor([[0.0, 1e-3, 0.0, 0.0]])
    difference = leave_one_out_log_z(changed, everything_valid(changed)) - leave_one_out_log_z(
        weights, everything_valid(weights)
    )
    assert difference[0, 1] == 0
    assert (difference[0, [0, 2, 3]] > 0).all()


def test_sole_evidence_is_compared_with_most_of_what_includes_it() -> None:
    weights = torch.tensor([[-INF, 0.5, -INF, -INF], [-INF, -INF, -INF, -INF], [2.0, 0.5, 1.0, 3.0]])
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[2] = torch.tensor([False, True, False, False])
    log_z = bounded_leave_one_out_log_z(weights, valid)
    expected = [0.5 - math.log(3), 0.5 - math.log(4) + math.log(3 / 4), 0.5 - math.log(3), 0.5 - math.log(3)]
    assert log_z[0].tolist() == pytest.approx(expected)
    assert (log_z[1] == -INF).all()
    assert log_z[2].tolist() == pytest.approx([0.5] * 4)  # the only valid one, also in its siblings' eyes
    # With a past the sample is not the sole evidence: it is left out again
    pooled = bounded_leave_one_out_log_z(weights[:1], valid[:1], torch.tensor([2.0]), torch.tensor([5.0]))
    assert pooled[0, 1].item() == pytest.approx(2.0 - math.log(8))


def test_no_evidence_is_minus_infinity() -> None:
    weights = torch.tensor([[-INF, -INF], [1.0, 2.0], [-INF, -INF]])
    valid = torch.tensor([[True, True], [False, False], [False, True]])
    assert (pooled_log_z(weights, valid) == -INF).all()
    assert (leave_one_out_log_z(weights, valid) == -INF).all()


# --- the evidence that fits the squared log-ratio best --------------------------------------------------------------


def test_vargrad_evidence_is_the_siblings_mean() -> None:
    """VarGrad; and then trajectory balance has KL-RL's coefficients."""
    y, divergence = all_groups(4, LOG_POLICY).outcomes, divergence_of("reverse_kl")
    pi, log_p, valid = LOG_POLICY[y], SOFT.log_target[y], everything_valid(y)
    log_z = vargrad_log_z(pi - log_p, valid)
    expected = torch.stack([(log_p - pi)[:, [j for j in range(4) if j != i]].mean(dim=1) for i in range(4)], dim=1)
    assert_equal(log_z, expected)
    assert_equal(coefficient_of(TrajectoryBalance(divergence), pi, log_p, pi, log_z), kl_rl_coefficient(y, LOG_POLICY))


# --- the baseline and the effective sample size --------------------------------------------------------------------


def test_leave_one_out_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]])
    valid = torch.tensor([[True] * 4, [True, False, True, True], [False, True, False, False]])
    means = leave_one_out_mean(values, valid)
    assert_equal(means[0], torch.tensor([14.0, 13.0, 11.0, 7.0]) / 3, atol=1e-6)
    assert_equal(means[1, [0, 2, 3]], torch.tensor([6.0, 4.5, 2.5]), atol=1e-6)
    assert means[2, 1] == 2  # alone, it is its own baseline and gives no gradient


@every_divergence
def test_leave_one_out_baseline_by_hand(name: str) -> None:
    divergence = divergence_of(name)
    log_ratio = vector(0.4, -0.3, 0.1, 0.9).unsqueeze(0)
    log_z = vector(-0.2, 0.3, 0.5, -0.1).unsqueeze(0)
    valid = torch.tensor([[True, True, False, True]])
    baseline = leave_one_out_baseline(log_ratio, log_z, valid, divergence)[0]
    for i, siblings in enumerate([[1, 3], [0, 3], [0, 1, 3], [0, 1]]):
        pseudo_rewards = [-divergence.slope(log_ratio[0, j] + log_z[0, i]).item() for j in siblings]
        assert baseline[i].item() == pytest.approx(sum(pseudo_rewards) / len(siblings))


@every_divergence
def test_leave_one_out_baseline_of_a_lone_sample_is_what_all_are_worth_at_the_posterior(name: str) -> None:
    divergence, log_ratio, log_z = divergence_of(name), vector(0.4, INF).unsqueeze(0), vector(0.7, 0.7).unsqueeze(0)
    baseline = leave_one_out_baseline(log_ratio, log_z, torch.tensor([[True, False]]), divergence)
    assert baseline[0, 0] == -divergence.slope(torch.zeros(1))


@pytest.mark.parametrize("estimator", [ScoreFunction, PolicyGradient, ImportanceWeights, TrajectoryBalance])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon"])
def test_one_completion_a_prompt_gives_the_gradient_where_z_is_known(
    estimator: Callable[[Divergence], Estimator], name: str
) -> None:
    divergence = {PolicyGradient: "reverse_kl", ImportanceWeights: "forward_kl"}.get(estimator, name)  # type: ignore[call-overload]
    gradient = expected_gradient(estimator(divergence_of(divergence)), SOFT, LOG_POLICY, group_size=1)
    assert_equal(gradient, exact_gradient(f_divergence(divergence, SOFT)))


def test_one_completion_a_prompt_gives_no_gradient_at_the_posterior() -> None:
    """Sample by sample: its baseline is what it is worth there."""
    log_target = vector(-1.0, -2.0)
    log_policy, log_target = (log_target - 0.5).unsqueeze(1), log_target.unsqueeze(1)
    group = Group(log_policy, log_policy, log_target, torch.zeros_like(log_target))
    for estimator in (ScoreFunction(divergence_of("jensen_shannon")), PolicyGradient(divergence_of("reverse_kl"))):
        terms = estimator.terms(group, fixed_log_z(vector(0.5, 0.5), group))
        assert_equal(terms.advantages, torch.zeros(2, 1, dtype=log_target.dtype))


@pytest.mark.parametrize("name", [name for name in TEXTBOOK if name != "total_variation"])  # its slope is flat
def test_leave_one_out_baseline_does_not_depend_on_the_sample_itself(name: str) -> None:
    """Neither directly nor through the evidence, on-policy: w = P / pi is in both."""

    def baseline(log_ratio: Tensor) -> Tensor:
        valid = everything_valid(log_ratio)
        log_z = leave_one_out_log_z(-log_ratio, valid)
        return leave_one_out_baseline(log_ratio, log_z, valid, divergence_of(name))[0]

    log_ratio = vector(0.4, -0.3, 0.1, 0.9).unsqueeze(0)
    jacobian = torch.autograd.functional.jacobian(baseline, log_ratio).squeeze(1)
    assert_equal(jacobian.diagonal(), ZERO, atol=0)


def test_effective_sample_size_limits() -> None:
    weights = torch.tensor([[3.0] * 4, [200.0, 0.0, -50.0, -INF], [-INF] * 4, [1.0, 1.0, -INF, -INF], [5.0] * 4])
    valid = torch.ones(5, 4, dtype=torch.bool)
    valid[4] = torch.tensor([True, True, False, False])
    assert effective_sample_size(weights, valid).tolist() == pytest.approx([1.0, 0.25, 0.0, 0.5, 1.0], abs=1e-6)
    assert effective_sample_size(weights, torch.zeros_like(valid)).tolist() == [0.0] * 5
    assert (effective_sample_size(weights, valid) <= 1 + 1e-6).all()


def test_effective_sample_size_is_kish_s() -> None:
    weights = vector(0.2, -1.0, 1.3, 0.6)
    w = weights.exp()
    expected = (w.sum().square() / w.square().sum() / 4).item()
    assert effective_sample_size(weights.unsqueeze(0), everything_valid(weights).unsqueeze(0)).item() == pytest.approx(
        expected
    )


# --- properties ----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Groups of samples as the trainers have them, all `(P, G)`."""

    log_policy: Tensor
    log_prior: Tensor
    phi: Tensor
    log_proposal: Tensor
    valid: Tensor

    @property
    def log_target(self) -> Tensor:
        return self.log_prior + self.phi


def everything(batch: Batch, name: str = "jensen_shannon") -> dict[str, Tensor]:
    """Every quantity of this module for a batch, with Z and the baseline from the batch."""
    pi, log_p, log_q, valid, divergence = *batch[:1], batch.log_target, *batch[3:], divergence_of(name)
    weights = log_p - log_q
    log_z = leave_one_out_log_z(weights, valid)
    usable = valid & log_z.isfinite()
    log_z = log_z.masked_fill(~usable, 0.0)
    baseline = leave_one_out_baseline(pi - log_p, log_z, usable, divergence)
    per_sample = {
        "f_dpg": coefficient_of(ScoreFunction(divergence), pi, log_p, log_q, log_z, baseline),
        "dpg": coefficient_of(DPG, pi, log_p, log_q, log_z),
        "tb": coefficient_of(TrajectoryBalance(divergence), pi, log_p, log_q, log_z),
        "log_z": log_z,
        "baseline": baseline,
    }
    per_group = {
        "group_log_z": pooled_log_z(weights, valid),
        "ess": effective_sample_size(weights, valid),
    }
    return {name: values.masked_fill(~usable, 0.0) for name, values in per_sample.items()} | per_group


PER_GROUP = ("group_log_z", "ess")


@st.composite
def batches(draw: st.DrawFn, size: float = 4.0, spread: float = 2.0) -> Batch:
    """Up to three groups of two to five samples, some invalid and some outside the support.

    `size` of phi, and `spread` of pi_0 and q around pi, in nats.
    """
    shape = draw(st.tuples(st.integers(1, 3), st.integers(2, 5)))
    count = shape[0] * shape[1]

    def tensor(values: st.SearchStrategy) -> Tensor:
        return torch.tensor(draw(st.lists(values, min_size=count, max_size=count))).view(shape)

    log_policy = tensor(st.floats(-30, -1)).double()
    log_prior, log_proposal = (log_policy + tensor(st.floats(-spread, spread)).double() for _ in range(2))
    phi = tensor(st.floats(-size, size)).double().masked_fill(tensor(st.integers(0, 4)) == 0, -INF)
    return Batch(log_policy, log_prior, phi, log_proposal, tensor(st.integers(0, 4)) > 0)


names_with_hard_constraints = st.sampled_from([name for name in TEXTBOOK if TEXTBOOK[name][1] < INF])
# Where the slope steps, rounding decides between -1/2 and 1/2
smooth_names = st.sampled_from([name for name in TEXTBOOK if TEXTBOOK[name][1] < INF and name != "total_variation"])


@for_all(batch=batches(), constant=st.floats(-20, 20), name=smooth_names)
def test_a_constant_added_to_phi_changes_z_alone(batch: Batch, constant: float, name: str) -> None:
    before, after = everything(batch, name), everything(batch._replace(phi=batch.phi + constant), name)
    # A completion whose siblings have no evidence has no leave-one-out Z
    usable = leave_one_out_log_z(batch.log_target - batch.log_proposal, batch.valid).isfinite() & batch.valid
    for quantity, values in before.items():
        expected = values + constant if quantity == "group_log_z" else values
        if quantity == "log_z":
            expected = torch.where(usable, values + constant, 0.0)
        torch.testing.assert_close(after[quantity], expected, atol=1e-6, rtol=1e-6, equal_nan=True, msg=quantity)


@for_all(batch=batches(), name=smooth_names, data=st.data())
def test_the_order_of_a_group_does_not_matter(batch: Batch, name: str, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(batch.valid.size(1))))
    before, after = everything(batch, name), everything(Batch(*(values[:, order] for values in batch)), name)
    for quantity, values in before.items():
        expected = values if quantity in PER_GROUP else values[:, order]
        torch.testing.assert_close(after[quantity], expected, atol=1e-8, rtol=1e-8, equal_nan=True, msg=quantity)


@for_all(
    batch=batches(), name=names_with_hard_constraints, junk=st.sampled_from([0.0, 7.0, 1e30, INF, -INF, math.nan])
)
def test_invalid_completions_do_not_matter(batch: Batch, name: str, junk: float) -> None:
    """Bit for bit, whatever stands in their place."""
    *tensors, valid = batch
    replaced = Batch(*(values.masked_fill(~valid, junk) for values in tensors), valid)
    before, after = everything(batch, name), everything(replaced, name)
    for quantity, values in before.items():
        torch.testing.assert_close(after[quantity], values, atol=0, rtol=0, equal_nan=True, msg=quantity)


@for_all(
    batch=st.one_of(batches(size=1e4), batches(size=1e4, spread=1e4)),
    name=names_with_hard_constraints,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_extreme_evidence_gives_no_nan(batch: Batch, name: str, dtype: torch.dtype) -> None:
    """Weights of e^(+-10,000): no NaN, and what becomes a gradient or a loss is finite."""
    *tensors, valid = batch
    quantities = everything(Batch(*(values.to(dtype) for values in tensors), valid), name)
    for quantity, values in quantities.items():
        assert values.dtype == dtype
        if quantity in ("reverse_kl", "forward_kl", "kl_prior"):
            continue  # NaN says that there is no estimate
        assert not values.isnan().any(), quantity
        if quantity != "group_log_z":
            assert values.isfinite().all(), quantity


def test_one_success_at_a_low_temperature_gives_a_finite_importance_coefficient() -> None:
    """A binary reward at beta = 0.01, 100 nats: one completion of the group has it, its siblings do not."""
    log_policy = torch.full((1, 4), -10.0)
    log_target = log_policy + torch.tensor([[100.0, 0.0, 0.0, 0.0]])
    log_z = leave_one_out_log_z(log_target - log_policy, everything_valid(log_policy))
    assert coefficient_of(DPG, log_policy, log_target, log_policy, log_z).isfinite().all()


@for_all(batch=batches(), name=smooth_names)
def test_float32_agrees_with_float64(batch: Batch, name: str) -> None:
    *tensors, valid = batch
    single = everything(Batch(*(values.float() for values in tensors), valid), name)
    for quantity, values in everything(batch, name).items():
        assert single[quantity].dtype == torch.float32
        finite = values[values.isfinite()]
        atol = 1e-4 * max(1.0, finite.abs().max().item() if len(finite) else 0.0)  # sums round at their largest term
        torch.testing.assert_close(
            single[quantity].double(), values, atol=atol, rtol=5e-3, equal_nan=True, msg=f"{quantity}, {atol}"
        )
