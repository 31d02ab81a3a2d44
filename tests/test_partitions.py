"""The running partition: means pooled over visits, by hand, and through a checkpoint file."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_bayes.groups import Group, pooled_log_z
from trl_bayes.partitions import Running


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
