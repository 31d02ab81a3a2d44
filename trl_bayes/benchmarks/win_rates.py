"""Win rates against the prior, of single samples and of the best and the worst of several: exact, and from samples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class WinRates(NamedTuple):
    """A distribution against the prior: the oracle table's columns, each between 0 and 1 but the first."""

    kl_prior: float
    """`KL(.||pi_0)` in nats."""
    plain: float
    """Probability that a sample has a higher reward than one of the prior; ties count half."""
    best_of_n: float
    """The same for the best of `n` samples of either."""
    worst_of_n: float
    """The same for the worst of `n` samples of either."""


def win_rates(log_probs: torch.Tensor, log_prior: torch.Tensor, rewards: torch.Tensor, n: int = 4) -> WinRates:
    """
    Exact win rates against the prior on an enumerated space.

    Args:
        log_probs (`torch.Tensor`): of all completions of one prompt, shape `(N,)`, in nats.
        log_prior (`torch.Tensor`): the prior's, shape `(N,)`.
        rewards (`torch.Tensor`): shape `(N,)`.
        n (`int`, *optional*, defaults to `4`): how many samples the best and the worst are taken of.
    """
    _, rank = rewards.unique(return_inverse=True)  # equal rewards are one outcome
    mass = torch.zeros(2, int(rank.max()) + 1, dtype=torch.float64)
    mass.index_add_(1, rank, torch.stack([log_probs, log_prior]).double().exp())  # (2, R)
    at_most = mass.cumsum(dim=1)
    at_least = mass.flip(1).cumsum(dim=1).flip(1)
    return WinRates(
        kl_prior=(log_probs.exp() * (log_probs - log_prior)).nansum().item(),
        plain=_wins(mass),
        best_of_n=_wins(at_most.pow(n).diff(dim=1, prepend=torch.zeros(2, 1, dtype=torch.float64))),
        worst_of_n=_wins(-at_least.pow(n).diff(dim=1, append=torch.zeros(2, 1, dtype=torch.float64))),
    )


def sampled_win_rates(rewards: torch.Tensor, prior_rewards: torch.Tensor, n: int = 4) -> WinRates:
    """
    Win rates from samples where completions cannot be enumerated, averaged over prompts.

    They are those of the two empirical distributions: exact in the limit, and without bias for `plain`.

    Args:
        rewards (`torch.Tensor`): of samples of the policy, shape `(P, N)`.
        prior_rewards (`torch.Tensor`): of samples of the prior for the same prompts, shape `(P, M)`.
        n (`int`, *optional*, defaults to `4`): how many samples the best and the worst are taken of.

    Returns:
        [`WinRates`]: with `NaN` as the distance from the prior, which rewards do not tell.
    """
    rates = []
    for ours, theirs in zip(rewards, prior_rewards, strict=True):
        log_share, none = -torch.full_like(ours, len(ours)).log(), torch.full_like(theirs, -math.inf)
        log_prior_share, prior_none = -torch.full_like(theirs, len(theirs)).log(), torch.full_like(ours, -math.inf)
        of_both = torch.cat([log_share, none]), torch.cat([prior_none, log_prior_share])
        rates.append(win_rates(*of_both, torch.cat([ours, theirs]), n)._replace(kl_prior=math.nan))
    return mean_rates(rates)


def _wins(mass: torch.Tensor) -> float:
    """`P(a > b) + P(a = b)/2` of two distributions `(2, R)` on the same ranks."""
    ours, theirs = mass
    return (ours * (theirs.cumsum(dim=0) - theirs / 2)).sum().item()


def mean_rates(rates: Sequence[WinRates]) -> WinRates:
    """Each column's average over prompts."""
    return WinRates(*(math.fsum(column) / len(rates) for column in zip(*rates, strict=True)))
