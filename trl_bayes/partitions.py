"""How log Z is found: from the group itself, from all visits to a prompt, from samples of the prior, or known."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch

from .groups import NEG_INF, Group, bounded_leave_one_out_log_z, log_mean, pooled_log_z
from .prior import PriorScores, PromptTable
from .targets import Target


class LogZ(NamedTuple):
    """`log Z` of the prompts of some groups, in nats."""

    of_completion: torch.Tensor
    """What each completion is compared with, `(P, G)`: where it is an estimate, without the completion's own weight.
    `-inf` for a prompt without evidence."""
    of_prompt: torch.Tensor
    """The best estimate there is, `(P,)`, for metrics."""
    is_informed: torch.Tensor
    """Whether more than this group tells it, boolean `(P,)`."""


class Partition(ABC):
    """
    A way to find the marginal likelihood `Z(x) = E_{pi_0}[exp(phi)]` of each prompt.

    A subclass says `log Z` of a group, what it needs, what it refuses, and what it remembers.
    """

    name: ClassVar[str]
    """By which the configuration names it."""

    needs_prompt_keys: bool = True
    """Whether it has to know which prompt a group belongs to."""

    needs_prior_samples: bool = False
    """Whether [`~Partition.learn`] must be called with scored samples of the prior before it is used."""

    @property
    def is_ready(self) -> bool:
        """Whether it can be used: nothing is to be learned, or it has been."""
        return True

    def check(self, target: Target) -> None:  # noqa: B027 - most work with any target
        """Raises `ValueError`, one sentence, for a target that it cannot work with."""

    def learn(self, prior: PriorScores, target: Target) -> None:  # noqa: B027 - nothing to learn by default
        """Learns from samples of the prior under a target that is bound and fitted."""

    @abstractmethod
    def log_z(self, group: Group) -> LogZ:
        """`log Z` of a group's prompts."""

    def update(self, group: Group) -> None:  # noqa: B027 - most remember nothing
        """Takes notice of a group that has been trained on."""

    def of_reused(self, keys: torch.Tensor, log_weights: torch.Tensor) -> LogZ | None:
        """
        `log Z` by now for completions that [`~Partition.update`] has seen, if training changes it; `None` where not.

        Args:
            keys (`torch.Tensor`): of their prompts, `(B,)`.
            log_weights (`torch.Tensor`): their own, as they were when they were sampled, `(B,)`.

        Returns:
            [`LogZ`]: every field `(B,)`.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What must survive a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nothing to restore by default
        """Restores what [`~Partition.state_dict`] saved."""


class LeaveOneOut(Partition):
    """`Z` of each completion from the others of its group; see [`~trl_bayes.groups.bounded_leave_one_out_log_z`]."""

    name = "leave_one_out"
    needs_prompt_keys = False

    def log_z(self, group: Group) -> LogZ:
        weights, valid = group.log_weights, group.valid
        of_prompt = pooled_log_z(weights, valid)
        return LogZ(
            bounded_leave_one_out_log_z(weights, valid), of_prompt, torch.zeros_like(of_prompt, dtype=torch.bool)
        )


class Running(Partition):
    """
    `Z(x)` of each prompt as the mean of all importance weights seen so far: `log mean w`.

    `E_q[P/q] = Z` whatever the policy `q` was, so the weights of earlier epochs stay valid while the policy moves, and
    the estimate gets sharper at every visit. A completion's own weight is left out, as in [`LeaveOneOut`], which this
    is at the first visit.
    """

    name = "running"

    def __init__(self) -> None:
        self._past: dict[int, tuple[float, float]] = {}  # prompt key -> (log sum of weights, number of weights)
        self._told: set[int] = set()  # keys of prompts of which some group has told Z

    def __len__(self) -> int:
        return len(self._past)

    def log_z(self, group: Group) -> LogZ:
        weights, valid = group.log_weights, group.valid
        past = self.past(_keys(group))
        pooled = pooled_log_z(weights, valid, *past)
        of_completion = bounded_leave_one_out_log_z(weights, valid, *past)
        return LogZ(of_completion, pooled, self._is_told(_keys(group)))

    def past(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What is known of some prompts.

        Args:
            keys (`torch.Tensor`): integer prompt keys of shape `(P,)`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: log sum of past weights (`-inf` if none), their number; both `(P,)`.
        """
        distinct, place = keys.unique(return_inverse=True)
        found = [self._past.get(key, (NEG_INF, 0.0)) for key in distinct.tolist()]
        log_sum, count = torch.tensor(found, device=keys.device)[place].unbind(dim=1)
        return log_sum, count

    def update(self, group: Group) -> None:
        """Adds a group's importance weights to each prompt. A prompt may occur more than once."""
        log_sums = group.log_weights.masked_fill(~group.valid, NEG_INF).logsumexp(dim=1).tolist()
        counts = group.valid.sum(dim=1).tolist()
        for key, log_sum, count in zip(_keys(group).tolist(), log_sums, counts, strict=True):
            past_log_sum, past_count = self._past.get(key, (NEG_INF, 0.0))
            self._past[key] = (_log_add(past_log_sum, log_sum), past_count + count)
        self._told.update(_keys(group)[group.tells_z].tolist())

    def of_reused(self, keys: torch.Tensor, log_weights: torch.Tensor) -> LogZ:
        """
        The mean of all weights of the prompt but the completion's own, `Z_{-i} = (S - w_i) / (N - 1)`.

        With its own weight in it a completion of large weight would count for too little. It is at least half of the
        mean of all, as [`~trl_bayes.groups.bounded_leave_one_out_log_z`] is of fresh ones at least 3/4: weights of
        replayed ones differ at the posterior too, where the bound is all the bias that there is.
        """
        log_sum, count = self.past(keys)
        pooled = log_mean(log_sum, count)
        share = (log_weights.to(log_sum) - log_sum).clamp(max=0.0).exp()  # w_i / S, but for rounding at most 1
        others = log_sum + torch.log1p(-share) - (count - 1).log()
        others = torch.where((count > 1) & pooled.isfinite(), others, pooled)
        return LogZ(torch.maximum(others, pooled - math.log(2)), pooled, self._is_told(keys))

    def _is_told(self, keys: torch.Tensor) -> torch.Tensor:
        distinct, place = keys.unique(return_inverse=True)
        return torch.tensor([key in self._told for key in distinct.tolist()], device=keys.device)[place]

    def state_dict(self) -> dict[str, Any]:
        """The whole state as lists, for a checkpoint."""
        keys = list(self._past)
        return {
            "keys": keys,
            "log_sum": [self._past[key][0] for key in keys],
            "count": [self._past[key][1] for key in keys],
            "told": [key in self._told for key in keys],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the state by a saved one."""
        values = zip(state["log_sum"], state["count"], strict=True)
        self._past = dict(zip(state["keys"], values, strict=True))
        self._told = {key for key, told in zip(state["keys"], state["told"], strict=True) if told}


class FromPriorSamples(Partition):
    """`Z` from samples of the prior: `log mean exp phi`, drawn before the first update and then fixed."""

    name = "prior_samples"
    needs_prior_samples = True

    def __init__(self) -> None:
        self.table: PromptTable | None = None

    @property
    def is_ready(self) -> bool:
        return self.table is not None

    def learn(self, prior: PriorScores, target: Target) -> None:
        log_z = prior.estimate_log_z(target).log_z
        self.table = PromptTable.of(prior.keys, log_z)
        if without := int((~log_z.isfinite()).sum()):
            warnings.warn(
                f"{without} of {len(log_z)} prompts have no prior sample with evidence, so they are left out of "
                "training: increase `num_prior_samples`, or set `partition='running'`.",
                stacklevel=2,
            )

    def log_z(self, group: Group) -> LogZ:
        assert self.table is not None  # the trainer calls `learn` first
        return fixed_log_z(self.table.lookup(_keys(group)), group)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.table is None else dict(self.table.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.table = PromptTable(**state) if state else None


class Known(Partition):
    """
    The target's own `log Z`, for one that knows it.

    Args:
        target ([`~trl_bayes.targets.Target`]): see `Target.log_z`.
    """

    name = "known"

    def __init__(self, target: Target):
        self.target = target

    def check(self, target: Target) -> None:
        try:
            knows = target.log_z(torch.empty(0, dtype=torch.int64)) is not None
        except ValueError:  # it wants to be fitted first, so there is something to know
            knows = not target.is_fitted
        if not knows:
            raise ValueError(
                f"The target {target!r} does not know its log Z: set `partition` to 'running', 'leave_one_out' or "
                "'prior_samples'."
            )

    def log_z(self, group: Group) -> LogZ:
        log_z = self.target.log_z(_keys(group))
        assert log_z is not None  # `check` refuses a target that does not know it
        return fixed_log_z(log_z, group)


def make_partition(name: str, target: Target) -> Partition:
    """
    The partition of a configuration.

    Raises:
        ValueError: no such name, or a target that it cannot work with; one sentence.
    """
    if name not in PARTITIONS:
        raise ValueError(f"Unknown `partition={name!r}`: use one of {list(PARTITIONS)}.")
    partition = PARTITIONS[name](target)
    partition.check(target)
    return partition


PARTITIONS: dict[str, Callable[[Target], Partition]] = {
    LeaveOneOut.name: lambda target: LeaveOneOut(),
    Running.name: lambda target: Running(),
    FromPriorSamples.name: lambda target: FromPriorSamples(),
    Known.name: Known,
}
"""By the names that a configuration can give: what makes one for a target."""


def _keys(group: Group) -> torch.Tensor:
    assert group.prompt_keys is not None  # `needs_prompt_keys` asks for them
    return group.prompt_keys


def fixed_log_z(log_z: torch.Tensor, group: Group) -> LogZ:
    """One `log Z` for each prompt of a group, `(P,)`, that the group has no part in."""
    log_z = log_z.to(group.log_policy)
    return LogZ(log_z.unsqueeze(1).expand_as(group.phi), log_z, torch.ones_like(log_z, dtype=torch.bool))


def _log_add(a: float, b: float) -> float:
    """`log(e^a + e^b)` for two floats, of which both may be `-inf`."""
    high, low = max(a, b), min(a, b)
    return high if low == NEG_INF else high + math.log1p(math.exp(low - high))
