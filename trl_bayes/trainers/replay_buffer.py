"""Past completions with what their reuse needs, and how they join a new batch."""

from collections import deque
from typing import Any

import torch
from trl.trainer.utils import pad

from ..estimators import Estimator, PairTerms, Terms
from ..partitions import Partition


_SEQUENCES = {"prompt": "left", "completion": "right", "prior_completion": "right"}  # side on which TRL pads each
_TERMS = tuple(dict.fromkeys((*Terms._fields, *PairTerms._fields, "prompt_key")))


class ReplayBuffer:
    """
    The latest completions of this process, or pairs of them, first in first out, on the CPU and without padding.

    Each keeps the log-probability `log q` of the policy that sampled it, so importance weights stay exact however much
    the policy moves on. The unnormalized posterior `log P` never changes, so neither rewards nor the prior are
    computed again.

    Args:
        capacity (`int`): number of completions to keep.
        seed (`int`): of the generator that draws from them.
    """

    def __init__(self, capacity: int, seed: int):
        self._rows: deque[dict[str, torch.Tensor]] = deque(maxlen=capacity)
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, batch: dict[str, Any]) -> None:
        """Adds every usable completion of a generated batch."""
        batch = {name: value.cpu() for name, value in batch.items() if isinstance(value, torch.Tensor)}
        for i in batch["usable"].nonzero().flatten().tolist():
            row = {name: batch[name][i].clone() for name in _TERMS if name in batch}
            for name in _sequences(batch):
                row[name] = batch[f"{name}_ids"][i][batch[f"{name}_mask"][i].bool()]
            if "tool_mask" in batch:
                row["tool_mask"] = batch["tool_mask"][i][batch["completion_mask"][i].bool()]
            self._rows.append(row)

    def sample(self, number: int) -> list[dict[str, torch.Tensor]]:
        """Draws distinct completions uniformly; fewer than `number` if the buffer does not hold as many."""
        order = torch.randperm(len(self._rows), generator=self._generator)[:number]
        return [self._rows[i] for i in order.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """All completions and the state of the generator."""
        return {"rows": list(self._rows), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what [`~ReplayBuffer.state_dict`] saved."""
        self._rows = deque(state["rows"], maxlen=self._rows.maxlen)
        self._generator.set_state(state["generator"])


def append_rows(
    batch: dict[str, Any], rows: list[dict[str, torch.Tensor]], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """
    A batch with replayed completions after the fresh ones, padded to a common length.

    Args:
        batch (`dict[str, Any]`): a generated batch of `B` completions.
        rows (`list[dict[str, torch.Tensor]]`): `R` completions of [`ReplayBuffer.sample`].
        pad_token_id (`int`): token for the padding.

    Returns:
        `dict[str, torch.Tensor]`: what the loss needs, with `B + R` rows; scalars are kept.
    """
    device = batch["prompt_ids"].device
    joined: dict[str, torch.Tensor] = {}
    for name, side in _sequences(batch).items():
        fresh_ids, fresh_mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
        ids = [*fresh_ids, *(row[name].to(device) for row in rows)]
        mask = [*fresh_mask, *(torch.ones_like(row[name]).to(device) for row in rows)]
        joined[f"{name}_ids"] = pad(ids, padding_value=pad_token_id, padding_side=side)
        joined[f"{name}_mask"] = pad(mask, padding_value=0, padding_side=side)
    if "tool_mask" in batch:
        tool_mask = [*batch["tool_mask"], *(row["tool_mask"].to(device) for row in rows)]
        joined["tool_mask"] = pad(tool_mask, padding_value=1, padding_side="right")
    for name in _TERMS:
        if name in batch:
            replayed = torch.stack([row[name] for row in rows]).to(device)
            joined[name] = torch.cat([batch[name], replayed])
    # Scalars come last: TRL takes the batch size from the first entry
    scalars = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim() == 0}
    return joined | scalars


def refresh(batch: dict[str, Any], start: int, partition: Partition, estimator: Estimator) -> None:
    """
    What replayed rows are compared with: `log Z` may be known better than when they were sampled.

    Like a fresh completion, a replayed one is compared with a `Z` from all others, in which its own weight has no
    part; the logged divergence is measured with the `Z` of all. Pairs are compared with each other and stay as they
    are.

    Args:
        batch (`dict[str, Any]`): from [`append_rows`].
        start (`int`): the first row that was replayed.
        partition ([`~trl_bayes.partitions.Partition`]): which has seen them.
        estimator ([`~trl_bayes.estimators.Estimator`]): of the gradient.
    """
    if "baseline" not in batch:
        return
    if "prompt_key" in batch:
        own = batch["log_target"][start:] - batch["log_proposal"][start:]
        if (log_z := partition.of_reused(batch["prompt_key"][start:], own)) is not None:
            latest = {"log_z": log_z.of_completion, "log_z_of_value": log_z.of_prompt}
            batch |= {name: torch.cat([batch[name][:start], new]) for name, new in latest.items()}
    reused = estimator.reused_baseline(batch["log_z"][start:])
    batch["baseline"] = torch.cat([batch["baseline"][:start], reused])


def _sequences(batch: dict[str, Any]) -> dict[str, str]:
    """The kinds of sequences that a batch has."""
    return {name: side for name, side in _SEQUENCES.items() if f"{name}_ids" in batch}
