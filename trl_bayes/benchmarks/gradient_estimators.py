"""The estimators of the gradient laboratory: from a scored group to a scalar whose gradient is the estimate."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import get_divergence
from ..estimators import (
    Estimator,
    ImportanceWeights,
    PolicyGradient,
    ScoreFunction,
    leave_one_out_mean,
)
from ..groups import Group, pooled_log_z
from ..partitions import LeaveOneOut, LogZ, fixed_log_z


class ScoredGroup(NamedTuple):
    """The `G` completions of one prompt, scored under the policy with its gradient, and under the prior."""

    log_policy: Tensor
    """Per token `(G, T)`, with its gradient; 0 after the end."""
    log_prior: Tensor
    """The same of the prior."""
    token_kl: Tensor
    """`KL(pi(.|s) || pi_0(.|s))` at each visited position, `(G, T)`, with its gradient; 0 after the end."""
    phi: Tensor
    """The log-potential, `(G,)`."""
    log_z: float | None
    """The prompt's own, where it is known."""

    @property
    def group(self) -> Group:
        """The same without gradients, on-policy, `(1, G)`."""
        log_policy = self.log_policy.detach().sum(dim=1).unsqueeze(0)
        return Group(log_policy, log_policy, self.log_prior.sum(dim=1).unsqueeze(0), self.phi.unsqueeze(0))

    @property
    def log_ratio(self) -> Tensor:
        """`log pi - log pi_0` per token, `(G, T)`, without gradient."""
        return self.log_policy.detach() - self.log_prior


Surrogate = Callable[[ScoredGroup], Tensor]
"""A scalar whose gradient estimates that of `D_f(pi||p) / f''(1)`."""


class Candidate(NamedTuple):
    """An estimator under test, as one row of the table."""

    name: str
    divergence: str
    surrogate: Surrogate
    needs_log_z: bool = False


def of_sequences(estimator: Estimator, log_z: str) -> Surrogate:
    """
    What the trainers do with a group.

    Args:
        estimator ([`~trl_bayes.estimators.Estimator`]): theirs.
        log_z (`str`): `known`, `leave_one_out`, or `self_normalized`: the group's own mean weight.
    """

    def surrogate(scored: ScoredGroup) -> Tensor:
        group = scored.group
        terms = estimator.terms(group, _log_z(group, scored, log_z))
        rows = type(terms)(*(term.squeeze(0) for term in terms))
        return estimator.loss(scored.log_policy.sum(dim=1), rows)[0]

    return surrogate


def _log_z(group: Group, scored: ScoredGroup, how: str) -> LogZ:
    if how == "leave_one_out":
        return LeaveOneOut().log_z(group)
    if how == "known":
        assert scored.log_z is not None  # `needs_log_z`
        return fixed_log_z(torch.tensor([scored.log_z]), group)
    return fixed_log_z(pooled_log_z(group.log_weights, group.valid), group)


def rao_blackwellized(scored: ScoredGroup) -> Tensor:
    """
    Reverse KL with the exact KL of each visited position instead of the sampled log-ratio:

        grad = -E_pi[sum_t grad log pi(y_t) (phi - sum_{s>t} KL_s - b_t)] + E_pi[sum_t grad KL_t],

    `b_t` the siblings' mean of what it is subtracted from.
    """
    kl = scored.token_kl.detach()
    future = kl.flip(1).cumsum(1).flip(1) - kl  # (G, T): sum over s > t
    worth = scored.phi.unsqueeze(1) - future
    return ((minus_siblings(-worth) * scored.log_policy) + scored.token_kl).sum(dim=1).mean()


def with_past(weight: float) -> Surrogate:
    """
    Reverse KL with a token's own worth: a share of the log-ratio of what came before it is taken out,

        c_t = (log pi - log P) - b - w (log-ratio before t - b_t),

    which depends on the prefix only, so any `w` that does not see the group is unbiased. 0 is the sequence-level
    estimator, 1 the reward-to-go.
    """

    def surrogate(scored: ScoredGroup) -> Tensor:
        whole = scored.log_ratio.sum(dim=1) - scored.phi  # (G,)
        past = scored.log_ratio.cumsum(1) - scored.log_ratio  # (G, T)
        return (minus_siblings(whole.unsqueeze(1) - weight * past) * scored.log_policy).sum(dim=1).mean()

    return surrogate


def mixture(first: Surrogate, second: Surrogate, weight: float) -> Surrogate:
    """`(1 - w) first + w second`."""
    return lambda scored: (1 - weight) * first(scored) + weight * second(scored)


def minus_siblings(values: Tensor) -> Tensor:
    """Values `(..., G, T)` minus the mean of the siblings' at the same position."""
    places = values.transpose(-1, -2)  # (..., T, G)
    flat = places.reshape(-1, places.size(-1))
    mean = leave_one_out_mean(flat, torch.ones_like(flat, dtype=torch.bool))
    return values - mean.view(places.shape).transpose(-1, -2)


SEQUENCE_LEVEL = "KL-RL, sequence-level (TRL's RLOO)"
"""The estimator that others are compared with."""


def candidates() -> list[Candidate]:
    """The estimators that need no tuning; the sequence-level reverse KL is the first."""
    reverse, forward, middle = (get_divergence(name) for name in ("reverse_kl", "forward_kl", "jensen_shannon"))
    dpg, js = ImportanceWeights(forward), ScoreFunction(middle)
    return [
        Candidate(SEQUENCE_LEVEL, reverse.name, of_sequences(PolicyGradient(reverse), "leave_one_out")),
        Candidate("KL-RL, Rao-Blackwellized", reverse.name, rao_blackwellized),
        Candidate("KL-RL, reward-to-go", reverse.name, with_past(1.0)),
        Candidate("DPG, leave-one-out Z", forward.name, of_sequences(dpg, "leave_one_out")),
        Candidate("DPG, self-normalized", forward.name, of_sequences(dpg, "self_normalized")),
        Candidate("DPG, known Z", forward.name, of_sequences(dpg, "known"), needs_log_z=True),
        Candidate("JS, leave-one-out Z", middle.name, of_sequences(js, "leave_one_out")),
        Candidate("JS, known Z", middle.name, of_sequences(js, "known"), needs_log_z=True),
    ]
