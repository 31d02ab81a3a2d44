"""The replay buffer: what goes in comes out, without padding in between, and joins a batch of another length."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.outcomes import LOG_PRIOR, SOFT, all_groups, divergence_of, group_gradient
from trl_bayes.estimators import Estimator, ImportanceWeights, ScoreFunction
from trl_bayes.groups import Group, leave_one_out_log_z, pooled_log_z
from trl_bayes.partitions import Running
from trl_bayes.trainers.replay_buffer import ReplayBuffer, append_rows, refresh


PAD = 0
SCALARS = ("log_target", "log_proposal", "log_z", "baseline", "advantages")


def make_batch(
    prompts: list[list[int]],
    completions: list[list[int]],
    usable: list[bool] | None = None,
    tool_masks: list[list[int]] | None = None,
    start: float = 0.0,
    keys: list[int] | None = None,
) -> dict[str, Any]:
    """A generated batch as TRL pads it: prompts on the left, completions on the right."""

    def padded(rows: list[list[int]], value: int, left: bool) -> Tensor:
        width = max(map(len, rows))
        fill = [[value] * (width - len(row)) for row in rows]
        return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, fill, strict=True)])

    size = len(prompts)
    batch: dict[str, Any] = {
        "prompt_ids": padded(prompts, PAD, left=True),
        "prompt_mask": padded([[1] * len(row) for row in prompts], 0, left=True),
        "completion_ids": padded(completions, PAD, left=False),
        "completion_mask": padded([[1] * len(row) for row in completions], 0, left=False),
        "usable": torch.tensor([True] * size if usable is None else usable),
        "num_items_in_batch": torch.tensor(42),
        "old_per_token_logps": torch.zeros(size, max(map(len, completions))),
        "num_images": None,
    }
    for offset, name in enumerate(SCALARS):
        batch[name] = torch.arange(size) + start + 100.0 * offset
    if tool_masks is not None:
        batch["tool_mask"] = padded(tool_masks, 1, left=False)
    if keys is not None:
        batch["prompt_key"] = torch.tensor(keys, dtype=torch.int64)
    return batch


def ids(rows: list[dict[str, Tensor]], name: str = "completion") -> list[list[int]]:
    return [row[name].tolist() for row in rows]


def contents(buffer: ReplayBuffer) -> list[float]:
    """What identifies the rows, sorted."""
    return sorted(row["log_target"].item() for row in buffer.sample(len(buffer)))


OLD = make_batch(
    [[5, 6], [7], [8, 9, 5]], [[1, 2, 3], [4], [0, 2]], tool_masks=[[1, 0, 1], [1], [0, 1]], keys=[11, 2**59, 13]
)


def test_rows_are_kept_without_padding() -> None:
    """Also where the padding token is one of the completion's own (row 2: the pad token is often EOS)."""
    buffer = ReplayBuffer(8, seed=0)
    buffer.add(OLD)
    rows = sorted(buffer.sample(3), key=lambda row: row["log_target"].item())
    assert ids(rows, "prompt") == [[5, 6], [7], [8, 9, 5]]
    assert ids(rows) == [[1, 2, 3], [4], [0, 2]]
    assert ids(rows, "tool_mask") == [[1, 0, 1], [1], [0, 1]]
    for i, row in enumerate(rows):
        assert [row[name].item() for name in SCALARS] == [i + 100.0 * offset for offset in range(len(SCALARS))]
        assert row["prompt_key"].item() == [11, 2**59, 13][i]
        assert row["usable"].item() is True
        assert set(row) == {*SCALARS, "usable", "prompt_key", "prompt", "completion", "tool_mask"}


def test_only_usable_rows_are_kept() -> None:
    buffer = ReplayBuffer(8, seed=0)
    buffer.add(make_batch([[5]] * 4, [[1]] * 4, usable=[True, False, True, False]))
    assert contents(buffer) == [0, 2]
    buffer.add(make_batch([[5]] * 2, [[1]] * 2, usable=[False, False]))
    assert len(buffer) == 2


def test_first_in_first_out() -> None:
    buffer = ReplayBuffer(5, seed=0)
    for start in (0.0, 10.0, 20.0):
        buffer.add(make_batch([[5]] * 3, [[1]] * 3, start=start))
    assert len(buffer) == 5
    assert contents(buffer) == [11, 12, 20, 21, 22]
    ReplayBuffer(2, seed=0).add(OLD)  # a batch larger than the buffer


def test_kept_rows_do_not_change_with_the_batch() -> None:
    buffer, batch = ReplayBuffer(8, seed=0), make_batch([[5, 6]], [[1, 2]])
    buffer.add(batch)
    for value in batch.values():
        if isinstance(value, Tensor):
            value.zero_()
    (row,) = buffer.sample(1)
    assert ids([row]) == [[1, 2]]
    assert row["baseline"].item() == 300


def test_draws_are_distinct_uniform_and_reproducible() -> None:
    first, again, other = ReplayBuffer(6, seed=3), ReplayBuffer(6, seed=3), ReplayBuffer(6, seed=4)
    for buffer in (first, again, other):
        buffer.add(make_batch([[5]] * 6, [[1]] * 6))
    global_state = torch.get_rng_state()
    drawn = [[row["log_target"].item() for row in first.sample(4)] for _ in range(300)]
    assert torch.equal(global_state, torch.get_rng_state()), "the global random state was moved"
    assert drawn == [[row["log_target"].item() for row in again.sample(4)] for _ in range(300)]
    assert drawn != [[row["log_target"].item() for row in other.sample(4)] for _ in range(300)]
    assert all(len(set(draw)) == 4 for draw in drawn)
    counts = torch.bincount(torch.tensor(drawn).long().flatten(), minlength=6)
    assert (counts - 200).abs().max() < 40  # 5 standard deviations of a binomial with n = 300, p = 4/6
    assert len(first.sample(100)) == 6  # no more than there are
    assert ReplayBuffer(6, seed=0).sample(2) == []


def test_replayed_rows_join_a_batch_of_another_length() -> None:
    buffer = ReplayBuffer(8, seed=0)
    buffer.add(OLD)
    rows = sorted(buffer.sample(3), key=lambda row: row["log_target"].item())
    fresh = make_batch([[3], [3, 4]], [[9, 9], [8]], tool_masks=[[1, 0], [1]], start=50.0, keys=[21, 22])
    joined = append_rows(fresh, rows, pad_token_id=PAD)
    assert joined["prompt_ids"].tolist() == [[0, 0, 3], [0, 3, 4], [0, 5, 6], [0, 0, 7], [8, 9, 5]]
    assert joined["prompt_mask"].tolist() == [[0, 0, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]]
    assert joined["completion_ids"].tolist() == [[9, 9, 0], [8, 0, 0], [1, 2, 3], [4, 0, 0], [0, 2, 0]]
    assert joined["completion_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert joined["tool_mask"].tolist() == [
        [1, 0, 1],
        [1, 1, 1],
        [1, 0, 1],
        [1, 1, 1],
        [0, 1, 1],
    ]  # TRL pads it with 1
    assert joined["log_target"].tolist() == [50, 51, 0, 1, 2]
    assert joined["baseline"].tolist() == [350, 351, 300, 301, 302]
    assert joined["usable"].tolist() == [True] * 5
    assert joined["prompt_key"].tolist() == [21, 22, 11, 2**59, 13]
    assert joined["num_items_in_batch"].item() == 42
    assert "old_per_token_logps" not in joined  # as long as the fresh completions, and not needed by the loss
    assert {name: value.dtype for name, value in joined.items()} == {name: fresh[name].dtype for name in joined}


def test_shorter_rows_join_a_longer_batch() -> None:
    buffer = ReplayBuffer(8, seed=0)
    buffer.add(make_batch([[7]], [[4]]))
    joined = append_rows(make_batch([[1, 2, 3]], [[5, 6, 7]]), buffer.sample(1), pad_token_id=9)
    assert joined["prompt_ids"].tolist() == [[1, 2, 3], [9, 9, 7]]
    assert joined["completion_ids"].tolist() == [[5, 6, 7], [4, 9, 9]]
    assert joined["completion_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "tool_mask" not in joined
    assert "prompt_key" not in joined


def test_a_joined_batch_goes_in_again_unchanged() -> None:
    """Unpadding undoes padding."""
    buffer, second = ReplayBuffer(8, seed=0), ReplayBuffer(8, seed=0)
    buffer.add(OLD)
    rows = buffer.sample(3)
    second.add(append_rows(make_batch([[3, 4, 5, 6]], [[9] * 5], tool_masks=[[1] * 5], keys=[1]), rows, PAD))
    kept = list(second.state_dict()["rows"])[1:]
    assert [{name: value.tolist() for name, value in row.items()} for row in kept] == [
        {name: value.tolist() for name, value in row.items()} for row in rows
    ]


def test_state_survives_a_checkpoint_file(tmp_path: Path) -> None:
    buffer = ReplayBuffer(5, seed=0)
    buffer.add(OLD)
    buffer.sample(2)  # the generator has moved on
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    restored = ReplayBuffer(5, seed=123)
    restored.load_state_dict(state)
    for _ in range(3):
        ours, theirs = restored.sample(2), buffer.sample(2)
        assert ids(ours) == ids(theirs)
        assert [row["log_proposal"].item() for row in ours] == [row["log_proposal"].item() for row in theirs]
    more = make_batch([[5]] * 4, [[1]] * 4, start=10.0)
    for either in (restored, buffer):
        either.add(more)
    assert len(restored) == 5
    assert contents(restored) == contents(buffer) == [2, 10, 11, 12, 13]


def test_a_smaller_buffer_keeps_the_latest_of_a_checkpoint() -> None:
    buffer, smaller = ReplayBuffer(5, seed=0), ReplayBuffer(2, seed=0)
    buffer.add(make_batch([[5]] * 5, [[1]] * 5))
    smaller.load_state_dict(buffer.state_dict())
    assert contents(smaller) == [3, 4]


@pytest.mark.parametrize("number", [1, 3])
def test_rows_are_on_the_cpu_in_the_batch_s_types(number: int) -> None:
    buffer = ReplayBuffer(8, seed=0)
    buffer.add(OLD)
    for row in buffer.sample(number):
        assert {value.device.type for value in row.values()} == {"cpu"}
        assert row["completion"].dtype == torch.int64
        assert row["log_target"].dtype == torch.float32
        assert row["usable"].dtype == torch.bool


def gradient_at_the_posterior(estimator: Estimator, group_size: int) -> float:
    """
    Length of an estimator's mean gradient at pi = p, where none is, from completions of the prior that are replayed
    with a running log Z that has seen them alone: summed over all groups.
    """
    groups = all_groups(group_size, LOG_PRIOR)
    y = groups.outcomes
    key = torch.arange(len(y))
    group = Group(SOFT.log_posterior[y], LOG_PRIOR[y], LOG_PRIOR[y], SOFT.log_target[y] - LOG_PRIOR[y], key)
    partition = Running()
    terms = estimator.terms(group, partition.log_z(group))
    partition.update(group)
    batch: dict[str, Any] = {name: value.flatten() for name, value in terms._asdict().items()}
    batch["prompt_key"] = key.repeat_interleave(group_size)
    refresh(batch, 0, partition, estimator)
    replayed = type(terms)(*(batch[name].view(y.shape) for name in terms._fields))
    # The logged divergence is measured with the whole Z
    whole = pooled_log_z(group.log_weights, group.valid)
    torch.testing.assert_close(replayed.log_z_of_value[:, 0].double(), whole, rtol=1e-6, atol=1e-6)
    coefficient = estimator.coefficient(replayed.sequences(group.log_policy))
    return groups.expectation(group_gradient(coefficient, y, SOFT.log_posterior)).norm().item()


REUSABLE = {
    "reverse_kl": ScoreFunction(divergence_of("reverse_kl")),
    "jensen_shannon": ScoreFunction(divergence_of("jensen_shannon")),
    "dpg": ImportanceWeights(divergence_of("forward_kl")),
}


@pytest.mark.parametrize(
    ("name", "group_size", "expected"),
    [
        ("reverse_kl", 2, 0.1285),  # 0.237 with the own weight in Z
        ("reverse_kl", 4, 0.0304),  # 0.142
        ("reverse_kl", 6, 0.0050),  # 0.101
        ("jensen_shannon", 2, 0.0381),  # 0.053
        ("jensen_shannon", 4, 0.0099),  # 0.034
        ("dpg", 2, 0.2063),  # 0.229
        ("dpg", 4, 0.0589),  # 0.139
    ],
)
def test_bias_of_replay_with_a_running_z(name: str, group_size: int, expected: float) -> None:
    """What is left is the rule of the lone success; without it there would be no bias at the posterior."""
    assert gradient_at_the_posterior(REUSABLE[name], group_size) == pytest.approx(expected, abs=1e-4)


def test_replayed_and_fresh_are_compared_with_the_same_z() -> None:
    """A group right after it was seen: the running log Z without each completion is its leave-one-out estimate."""
    partition, phi = Running(), torch.tensor([[1.0, 0.0, -1.0, 0.5], [9.0, 0.0, 0.0, -torch.inf]])
    zeros, keys = torch.zeros_like(phi), torch.tensor([1, 2])
    group = Group(zeros, zeros, zeros, phi, keys)
    partition.update(group)
    log_z = partition.of_reused(keys.repeat_interleave(4), phi.flatten())
    expected = leave_one_out_log_z(phi, group.valid)
    expected[1, 0] = pooled_log_z(phi, group.valid)[1] - math.log(2)  # it has nearly all of the weight
    torch.testing.assert_close(log_z.of_completion.view(2, 4), expected)
    torch.testing.assert_close(log_z.of_prompt, pooled_log_z(phi, group.valid).repeat_interleave(4))
    assert log_z.is_informed.all()


def test_z_of_what_a_running_partition_knows_nothing_else_of() -> None:
    """One completion alone, none, and no evidence: from itself, or nothing."""
    partition, phi = Running(), torch.tensor([[2.0], [-torch.inf]])
    zeros = torch.zeros_like(phi)
    partition.update(Group(zeros, zeros, zeros, phi, torch.tensor([1, 2])))
    log_z = partition.of_reused(torch.tensor([1, 2, 3]), torch.tensor([2.0, -torch.inf, 2.0]))
    assert log_z.of_completion.tolist() == [2.0, -torch.inf, -torch.inf]
    assert log_z.of_prompt.tolist() == [2.0, -torch.inf, -torch.inf]
    assert not log_z.is_informed.any()
