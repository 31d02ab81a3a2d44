"""How log Z is found: from the group itself, from all visits to a prompt, from samples of the prior, or known."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy
import torch

from .groups import NEG_INF, Group, bounded_fixed_log_z, bounded_leave_one_out_log_z, differ, log_mean, pooled_log_z
from .prior import PriorScores, PromptTable, log_z_from_prior
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

    warning: str | None = None
    """What a user should know of what it has learned."""

    @property
    def is_ready(self) -> bool:
        """Whether it can be used: nothing is to be learned, or it has been."""
        return True

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
            self._past[key] = (float(numpy.logaddexp(past_log_sum, log_sum)), past_count + count)
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

    def start(self, keys: torch.Tensor, log_sum: torch.Tensor, count: torch.Tensor) -> None:
        """Gives prompts a past, of samples of anything: as [`~Running.past`] has it. What has a past keeps it."""
        for key, *past in zip(keys.tolist(), log_sum.tolist(), count.tolist(), strict=True):
            self._past.setdefault(key, (past[0], past[1]))

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
    """
    `Z` from `N` samples of the prior, `Z_N = mean exp phi`, drawn before the first update and then fixed.

    A completion so heavy that it contradicts them joins them, `Z_i = max(Z_N, 3/4 (N Z_N + w_i) / (N + 1))`: the rule
    of the lone success, which bounds `w_i / Z_i` by `4/3 (N + 1)` and acts on no `w_i` below `(N + 4)/3 Z_N`.
    On-policy at the posterior all weights are equal, so the fixed point stays where it is. Elsewhere it acts on what
    `q` draws with a probability of at most `3/N` (Markov's inequality, `E_q[w] = Z`).

    Samples that all have the same log-potential say nothing of completions with another, unless theirs is the largest
    that there is. `Z` of such a prompt is that of [`Running`], which starts from these samples.
    """

    name = "prior_samples"
    needs_prior_samples = True

    def __init__(self) -> None:
        self.table: PromptTable | None = None  # log Z_N, N and whether they inform, (P, 3)
        self._visits = Running()  # of prompts that are not informed

    @property
    def is_ready(self) -> bool:
        return self.table is not None

    def learn(self, prior: PriorScores, target: Target) -> None:
        phi = prior.log_potential(target)
        log_z = log_z_from_prior(phi)
        number = (~phi.isnan()).sum(dim=1).to(log_z)
        largest = target.max_log_potential()
        informed = log_z.isfinite() & (differ(phi) | (phi == (math.inf if largest is None else largest)).any(dim=1))
        self.table = PromptTable.of(prior.keys, torch.stack([log_z, number, informed.to(log_z)], dim=1))
        others = ~informed
        log_sum = torch.where(number > 0, log_z + number.log(), NEG_INF)
        self._visits.start(prior.keys[others], log_sum[others], number[others])
        self.warning = _not_informed(int(others.sum()), int((log_sum == NEG_INF).sum()), phi.shape)

    def log_z(self, group: Group) -> LogZ:
        return self._instead_of(self._visits.log_z(group), _keys(group), group.log_weights)

    def update(self, group: Group) -> None:
        others = ~self._of(_keys(group), group.log_weights)[2]
        if others.any():
            self._visits.update(Group(*(each[others] for each in group if each is not None)))

    def of_reused(self, keys: torch.Tensor, log_weights: torch.Tensor) -> LogZ:
        visits = self._visits.of_reused(keys, log_weights)
        as_groups = visits._replace(of_completion=visits.of_completion.unsqueeze(1))  # of one completion each
        found = self._instead_of(as_groups, keys, log_weights.unsqueeze(1))
        return found._replace(of_completion=found.of_completion.squeeze(1))

    def _instead_of(self, visits: LogZ, keys: torch.Tensor, weights: torch.Tensor) -> LogZ:
        """What samples of the prior say, or else the visits; of completions with these weights `(P, G)`."""
        log_z, number, informed = self._of(keys, weights)
        return LogZ(
            torch.where(informed.unsqueeze(1), bounded_fixed_log_z(log_z, number, weights), visits.of_completion),
            torch.where(informed, log_z, visits.of_prompt),
            informed | visits.is_informed,
        )

    def _of(self, keys: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`log Z_N`, `N` and whether they inform, of some prompts, `(P,)` each."""
        assert self.table is not None  # the trainer calls `learn` first
        log_z, number, informed = self.table.lookup(keys).to(like).unbind(dim=1)
        return log_z, number, informed.bool()

    def state_dict(self) -> dict[str, Any]:
        if self.table is None:
            return {}
        visits = {f"visits_{name}": value for name, value in self._visits.state_dict().items()}
        return {**self.table.state_dict(), **visits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        visits = {name.removeprefix("visits_"): value for name, value in state.items() if name.startswith("visits_")}
        if state and not visits:
            raise ValueError(
                "The checkpoint was written by an earlier version of trl_bayes, which kept less of the samples of the "
                "prior: start a new run from the checkpoint's weights."
            )
        self.table = PromptTable(state["keys"], state["values"]) if state else None
        if state:
            self._visits.load_state_dict(visits)


def _not_informed(number: int, without: int, shape: torch.Size) -> str | None:
    """One sentence for prompts whose samples of the prior do not tell `Z`; `without` of them have no evidence."""
    if number == 0:
        return None
    evidence = f" ({without} of them: none with evidence)" if without else ""
    return (
        f"{number} of {shape[0]} prompts have {shape[1]} prior samples without a difference in log-potential"
        f"{evidence}, so a rarer completion was not seen and Z is told by what training samples besides, as with "
        "`partition='running'`: increase `num_prior_samples`, unless the reward of these prompts is constant."
    )


class Known(Partition):
    """
    The target's own `log Z`, for one that knows it.

    Args:
        target ([`~trl_bayes.targets.Target`]): see `Target.log_z`.

    Raises:
        ValueError: the target does not know its log Z.
    """

    name = "known"

    def __init__(self, target: Target):
        try:
            knows = target.log_z(torch.empty(0, dtype=torch.int64)) is not None
        except ValueError:  # it wants to be fitted first, so there is something to know
            knows = not target.is_fitted
        if not knows:
            raise ValueError(
                f"The target {target!r} does not know its log Z: set `partition` to 'running', 'leave_one_out' or "
                "'prior_samples'."
            )
        self.target = target

    def log_z(self, group: Group) -> LogZ:
        log_z = self.target.log_z(_keys(group))
        assert log_z is not None  # refused at the start
        return fixed_log_z(log_z, group)


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
