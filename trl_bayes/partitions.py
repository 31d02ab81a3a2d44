"""The `running` partition: what a training run has learned so far about each prompt's evidence."""

import math
from typing import Any

import torch

from .estimators import NEG_INF


class RunningPartition:
    """
    Evidence `Z(x)` of each prompt as the mean of all importance weights seen so far: `log mean w`.

    `E_q[P/q] = Z` whatever the policy `q` was, so the weights of earlier epochs stay valid while the policy moves, and
    the estimate gets sharper at every visit.
    """

    def __init__(self) -> None:
        self._past: dict[int, tuple[float, float]] = {}  # prompt key -> (log sum of weights, number of weights)

    def __len__(self) -> int:
        return len(self._past)

    def past(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What is known of some prompts.

        Args:
            keys (`torch.Tensor`): integer prompt keys of shape `(P,)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: log sum of past weights (`-inf` if none), their number; both `(P,)`.
        """
        found = [self._past.get(key, (NEG_INF, 0.0)) for key in keys.tolist()]
        log_sum, count = zip(*found, strict=True)
        return torch.tensor(log_sum, device=keys.device), torch.tensor(count, device=keys.device)

    def update(self, keys: torch.Tensor, weights: torch.Tensor, valid: torch.Tensor) -> None:
        """
        Adds a group of log importance weights to each prompt. A prompt may occur more than once.

        Args:
            keys (`torch.Tensor`): integer prompt keys of shape `(P,)`.
            weights (`torch.Tensor`): log importance weights `(P, G)`.
            valid (`torch.Tensor`): boolean `(P, G)`.
        """
        log_sums = weights.masked_fill(~valid, NEG_INF).logsumexp(dim=1).tolist()
        counts = valid.sum(dim=1).tolist()
        for key, log_sum, count in zip(keys.tolist(), log_sums, counts, strict=True):
            past_log_sum, past_count = self._past.get(key, (NEG_INF, 0.0))
            self._past[key] = (
                _log_add(past_log_sum, log_sum),
                past_count + count,
            )

    def log_z(self, keys: torch.Tensor) -> torch.Tensor:
        """The estimate `log Z` of some prompts, shape `(P,)`, in nats; `-inf` where nothing is known."""
        log_sum, count = self.past(keys)
        return torch.where(count > 0, log_sum - count.log(), NEG_INF)

    def state_dict(self) -> dict[str, Any]:
        """The whole state as three lists, for a checkpoint."""
        keys = list(self._past)
        return {
            "keys": keys,
            "log_sum": [self._past[key][0] for key in keys],
            "count": [self._past[key][1] for key in keys],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the state by a saved one."""
        values = zip(state["log_sum"], state["count"], strict=True)
        self._past = dict(zip(state["keys"], values, strict=True))


def _log_add(a: float, b: float) -> float:
    """`log(e^a + e^b)` for two floats, of which both may be `-inf`."""
    high, low = max(a, b), min(a, b)
    return high if low == NEG_INF else high + math.log1p(math.exp(low - high))
