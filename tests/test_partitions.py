"""Partitions by hand: means pooled over visits, samples of the prior that tell Z or do not, and checkpoint files."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.outcomes import coefficient_of
from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import TrajectoryBalance
from trl_bayes.groups import Group, pooled_log_z
from trl_bayes.partitions import FromPriorSamples, Running
from trl_bayes.prior import PriorScores
from trl_bayes.targets import Target


INF = math.inf
WEIGHTS = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.2, -0.3]])
VALID = torch.tensor([[True, True, True], [True, False, True]])
BIG = 2**59 + 12345  # prompt keys are 60-bit hashes


def keys(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def group(prompt_keys: Tensor, weights: Tensor, valid: Tensor) -> Group:
    """A group with these log weights: all of it is the log-potential."""
    zeros = torch.zeros_like(weights)
    return Group(zeros, zeros, zeros, weights.masked_fill(~valid, torch.nan), prompt_keys)


def update(partition: Running, prompt_keys: Tensor, weights: Tensor, valid: Tensor) -> None:
    partition.update(group(prompt_keys, weights, valid))


def latest(partition: Running, prompt_keys: Tensor) -> Tensor:
    """`log Z` of some prompts by now, `(B,)`, as it would be for a reused completion without weight."""
    estimate = partition.of_reused(prompt_keys, torch.full(prompt_keys.shape, -INF))
    assert estimate is not None
    return estimate.of_prompt


def mean_weight(*groups: Tensor) -> float:
    return torch.cat(groups).exp().mean().item()


def test_nothing_is_known_at_first() -> None:
    partition = Running()
    log_sum, count = partition.past(keys(3, BIG))
    assert log_sum.tolist() == [-INF, -INF]
    assert count.tolist() == [0, 0]
    assert latest(partition, keys(3)).tolist() == [-INF]
    assert len(partition) == 0


def test_visits_are_pooled_per_prompt() -> None:
    partition, later = Running(), torch.tensor([[1.5, 0.0, -2.0]])
    update(partition, keys(7, BIG), WEIGHTS, VALID)
    assert latest(partition, keys(BIG, 7)).exp().tolist() == pytest.approx(
        [mean_weight(WEIGHTS[1, [0, 2]]), mean_weight(WEIGHTS[0])]
    )
    update(partition, keys(7), later, torch.ones(1, 3, dtype=torch.bool))
    assert len(partition) == 2
    assert latest(partition, keys(7)).exp().item() == pytest.approx(mean_weight(WEIGHTS[0], later[0]))
    log_sum, count = partition.past(keys(BIG + 1, 7, BIG))
    assert count.tolist() == [0, 6, 2]
    assert log_sum[1:].exp().tolist() == pytest.approx(
        [6 * mean_weight(WEIGHTS[0], later[0]), 2 * mean_weight(WEIGHTS[1, [0, 2]])]
    )


def test_a_prompt_may_come_twice_in_one_batch() -> None:
    twice, one_by_one = Running(), Running()
    update(twice, keys(4, 4), WEIGHTS, VALID)
    for row in range(2):
        update(one_by_one, keys(4), WEIGHTS[row : row + 1], VALID[row : row + 1])
    assert twice.state_dict() == one_by_one.state_dict()
    assert latest(twice, keys(4, 4)).exp().tolist() == pytest.approx(2 * [mean_weight(WEIGHTS[0], WEIGHTS[1, [0, 2]])])


def test_invalid_completions_and_those_without_evidence() -> None:
    partition = Running()
    weights = torch.tensor([[torch.nan, 1.0, INF], [-INF, -INF, 0.0], [-INF, -INF, -INF]])
    valid = torch.tensor([[False, True, False], [True, True, True], [True, True, True]])
    update(partition, keys(1, 2, 3), weights, valid)
    assert latest(partition, keys(1, 2, 3)).tolist() == pytest.approx([1.0, -math.log(3), -INF])
    update(partition, keys(1, 3), weights[:2], torch.zeros(2, 3, dtype=torch.bool))
    assert latest(partition, keys(1, 2, 3)).tolist() == pytest.approx([1.0, -math.log(3), -INF])
    update(partition, keys(3), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool))  # evidence at last
    assert latest(partition, keys(3)).exp().item() == pytest.approx(0.5)


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_extreme_weights(size: float) -> None:
    partition = Running()
    for shift in (0.0, 50.0, -50.0):
        update(partition, keys(1), torch.full((1, 2), size + shift), torch.ones(1, 2, dtype=torch.bool))
    estimate = latest(partition, keys(1)).item()
    assert size + 40 < estimate < size + 50


def test_what_it_gives_is_what_the_leave_one_out_estimate_takes() -> None:
    """Two visits: without one sample, the evidence is the mean over both visits' other weights."""
    partition, later = Running(), torch.tensor([[1.5, 0.0, -2.0]])
    update(partition, keys(7), WEIGHTS[:1], VALID[:1])
    log_z = partition.log_z(group(keys(7), later, torch.ones(1, 3, dtype=torch.bool)))
    expected = [mean_weight(WEIGHTS[0], later[0, torch.arange(3) != i]) for i in range(3)]
    assert log_z.of_completion.exp()[0].tolist() == pytest.approx(expected)
    assert log_z.of_prompt.exp().item() == pytest.approx(mean_weight(WEIGHTS[0], later[0]))


def test_first_visit_is_the_group_estimate() -> None:
    partition = Running()
    update(partition, keys(1, 2), WEIGHTS, VALID)
    torch.testing.assert_close(latest(partition, keys(1, 2)), pooled_log_z(WEIGHTS, VALID))


def test_state_survives_a_checkpoint_file(tmp_path: Path) -> None:
    partition = Running()
    update(partition, keys(7, BIG, 3), torch.cat([WEIGHTS, WEIGHTS[:1] - INF]), torch.cat([VALID, VALID[:1]]))
    torch.save(partition.state_dict(), tmp_path / "state.pt")
    state: dict[str, Any] = torch.load(tmp_path / "state.pt", weights_only=True)
    restored = Running()
    update(restored, keys(99), WEIGHTS[:1], VALID[:1])  # replaced by the saved state, not merged with it
    restored.load_state_dict(state)
    assert len(restored) == 3
    everyone = keys(7, BIG, 3, 99)
    for ours, theirs in zip(restored.past(everyone), partition.past(everyone), strict=True):
        assert torch.equal(ours, theirs)
    for either in (partition, restored):
        update(either, keys(7), WEIGHTS[1:], VALID[1:])
    assert restored.state_dict() == partition.state_dict()


def test_a_saved_state_is_a_snapshot() -> None:
    partition = Running()
    update(partition, keys(1), WEIGHTS[:1], VALID[:1])
    state = partition.state_dict()
    update(partition, keys(1, 2), WEIGHTS, VALID)
    restored = Running()
    restored.load_state_dict(state)
    assert len(restored) == 1
    assert restored.past(keys(1))[1].tolist() == [3]


# --- samples of the prior --------------------------------------------------------------------------------------------

N = 100


class Identity(Target):
    """`phi` is the reward, at most 5; -99 is no evidence."""

    hard = True

    def log_potential(self, rewards: Tensor) -> Tensor:
        return rewards[:, 0].masked_fill(rewards[:, 0] == -99, -INF)

    def max_log_potential(self) -> float:
        return 5.0


def from_prior(*phi: list[float]) -> FromPriorSamples:
    """The partition after it has seen these log-potentials, of prompts 0, 1, ..."""
    partition, rewards = FromPriorSamples(), torch.tensor(phi).unsqueeze(2)
    scores = PriorScores(rewards, torch.zeros(rewards.shape[:2]), torch.arange(len(phi)))
    target = Identity()
    target.bind(["reward"], None)
    partition.learn(scores, target)
    return partition


def groups_of(*weights: list[float]) -> Group:
    """Groups of prompts 0, 1, ... at the prior."""
    return group(torch.arange(len(weights)), torch.tensor(weights), torch.ones(len(weights), len(weights[0])).bool())


SILENT, SHOWN = [0.0] * N, [0.0] * (N - 1) + [2.0]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("prior", [SILENT, SHOWN], ids=["silent", "shown"])
def test_a_success_that_no_prior_sample_shows_has_a_bounded_ratio(prior: list[float], size: int) -> None:
    """DPG's factor was 22,025 here."""
    weights = [10.0] + [0.0] * (size - 1)
    log_z = from_prior(prior).log_z(groups_of(weights))
    counted = N + (1 if prior is SHOWN else size)
    assert 10 < math.exp(10 - log_z.of_completion[0, 0].item()) <= 4 / 3 * counted * (1 + 1e-5)
    failures = log_z.of_completion[0, 1:]
    if prior is SHOWN:  # which keep the samples' own Z, that training has no part in
        assert failures.tolist() == pytest.approx([math.log((99 + math.exp(2)) / 100)] * (size - 1), abs=1e-6)
        assert log_z.of_prompt.item() == pytest.approx(math.log((99 + math.exp(2)) / 100), abs=1e-6)
    else:
        expected = math.log((N + size - 2 + math.exp(10)) / (N + size - 1))
        assert failures.tolist() == pytest.approx([expected] * (size - 1), abs=1e-5)


def test_samples_that_differ_are_contradicted_by_heavy_completions_only() -> None:
    log_z = math.log((99 + math.exp(2)) / 100)
    largest = log_z + math.log((N + 4) / 3)
    found = from_prior(SHOWN).log_z(groups_of([largest - 1e-3, largest + 1e-3, -5.0, -INF])).of_completion[0]
    assert (found - log_z).abs().lt(1e-6).tolist() == [True, False, True, True]


@pytest.mark.parametrize("prior", [SILENT, SHOWN], ids=["silent", "shown"])
def test_the_fixed_point_of_prior_samples_stays(prior: list[float]) -> None:
    """At the posterior all weights are Z, here far from the estimate: all ratios are equal, and the gradient is 0."""
    found = from_prior(prior).log_z(groups_of([7.0, 7.0, 7.0])).of_completion[0]
    assert found.tolist() == [found[0].item()] * 3


@pytest.mark.parametrize(("name", "limit"), [("reverse_kl", 0.42), ("jensen_shannon", 0.1), ("forward_kl", 0.34)])
def test_off_policy_at_the_posterior_trajectory_balance_is_off_by_order_1_over_n(name: str, limit: float) -> None:
    """Completions of the prior, at all sizes and rates of a success: the mean of the factor, which is to be 0."""
    divergence, worst = get_divergence(name), {}
    for number in (10, 100, 1000):
        log_ratio = torch.linspace(0, 3 * math.log(number), 200)  # log p/q of a success
        rate = torch.exp(-log_ratio)  # that p gives nearly all to
        partition = from_prior([0.0] * (number - 1) + [1e-7])
        log_z = partition.log_z(groups_of(log_ratio.tolist())).of_completion[0]
        factor = coefficient_of(
            TrajectoryBalance(divergence), log_ratio, log_ratio, torch.zeros_like(log_ratio), log_z
        )
        worst[number] = (rate * factor).abs().max().item()
    assert all(0.7 * limit < value * number < limit for number, value in worst.items())


def test_what_informs() -> None:
    """Log-potentials that differ, or the largest that there is; NaN says nothing."""
    partition = from_prior(
        [0.0, 1.0], [0.0, 0.0], [5.0, 5.0], [0.0, math.nan], [-99.0, -99.0], [-99.0, 0.0], [math.nan] * 2
    )
    silent = groups_of(*[[0.0, 0.0]] * 7)
    assert partition.log_z(silent).is_informed.tolist() == [True, False, True, False, False, True, False]
    assert partition.warning is not None
    assert partition.warning.startswith(
        "4 of 7 prompts have 2 prior samples without a difference in log-potential (2 of"
    )
    assert from_prior([0.0, 1.0], [5.0, 5.0]).warning is None


def test_visits_tell_what_the_samples_have_not(tmp_path: Path) -> None:
    """The mean of all weights, those of the samples included, and through a checkpoint; an informed Z stays."""
    partition = from_prior(SILENT, SHOWN)
    before = partition.log_z(groups_of([0.0, 0.0], [0.0, 0.0]))
    partition.update(groups_of([3.0, 0.0], [3.0, 0.0]))
    torch.save(partition.state_dict(), tmp_path / "state.pt")
    restored = FromPriorSamples()
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in (partition, restored):
        after = each.log_z(groups_of([0.0, 0.0], [0.0, 0.0]))
        assert after.of_prompt.tolist() == pytest.approx(
            [math.log((N + 3 + math.exp(3)) / (N + 4)), before.of_prompt[1].item()]
        )
        assert (before.is_informed.tolist(), after.is_informed.tolist()) == ([False, True], [True, True])
        reused = each.of_reused(keys(0, 1), torch.tensor([3.0, 3.0]))
        assert reused.of_completion.tolist() == pytest.approx(
            [math.log(1), before.of_completion[1, 0].item()], abs=1e-6
        )


def test_the_state_of_an_earlier_version_is_refused() -> None:
    state = {"keys": torch.arange(2), "values": torch.zeros(2)}
    with pytest.raises(ValueError, match="written by an earlier version of trl_bayes"):
        FromPriorSamples().load_state_dict(state)
