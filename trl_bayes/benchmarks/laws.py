"""Distributions over completions that are enumerated: rewards, distances, best-of-N and tilts of them, exactly.

A law is a tensor `(..., N)` of log-probabilities of all completions, in nats and float64; what is in front of the last
dimension, such as prompts, is kept. What a figure shows is computed from these and has no sampling error.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .enumeration import Completions


def expected(log_law: Tensor, values: Tensor) -> Tensor:
    """`E[value]`, `(...)`, of values `(N,)` or `(..., N)`; what is infinite where the law has no mass adds nothing."""
    law = log_law.exp()
    return torch.where(law > 0, law * values, 0.0).sum(dim=-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """`KL(a||b)` in nats, `(...)`; infinite where `a` has mass and `b` has none."""
    return expected(log_a, log_a - log_b)


def entropy(log_law: Tensor) -> Tensor:
    """In nats, `(...)`."""
    return -expected(log_law, log_law)


def expected_distinct(log_law: Tensor, n: int) -> Tensor:
    """How many different completions there are on average among `n` samples, `(...)`: `sum_y 1 - (1 - pi(y))^n`."""
    return -torch.expm1(n * torch.log1p(-log_law.exp().clamp(max=1 - 1e-15))).sum(dim=-1)


class Cumulative(NamedTuple):
    """Where each completion stands among samples of the prior, `(..., N)` each."""

    below: Tensor
    """`P(r(z) < r(y))`."""
    at_most: Tensor
    """`P(r(z) <= r(y))`, so that ties have the same two numbers."""

    @property
    def middle(self) -> Tensor:
        """The calibrated reward `u`, with half of the ties."""
        return (self.below + self.at_most) / 2


def cumulative(log_prior: Tensor, rewards: Tensor) -> Cumulative:
    """The prior's distribution function at each completion's reward `(N,)`."""
    _, rank = rewards.unique(return_inverse=True)  # equal rewards are one class
    mass = log_prior.new_zeros(*log_prior.shape[:-1], int(rank.max()) + 1)
    mass = mass.index_add(-1, rank, log_prior.exp())
    at_most = mass.cumsum(dim=-1) / mass.sum(dim=-1, keepdim=True)
    below = torch.cat([torch.zeros_like(at_most[..., :1]), at_most[..., :-1]], dim=-1)
    return Cumulative(below[..., rank], at_most[..., rank])


def best_of_n_law(log_prior: Tensor, rewards: Tensor, n: int) -> Tensor:
    """
    The law of the best of `n` samples of the prior, `(..., N)`, exact with ties, which are broken at random.

    A class of completions with equal reward on the quantiles from `a` to `b` is the best with probability
    `b^n - a^n`, and inside it the prior decides: `log pi_0 + log[(b^n - a^n) / (b - a)]`. See
    https://huggingface.co/papers/2401.01879.
    """
    a, b = cumulative(log_prior, rewards)
    return log_prior + (b.pow(n) - a.pow(n)).log() - (b - a).log()


def tilt(log_prior: Tensor, values: Tensor, beta: float) -> Tensor:
    """`p ∝ pi_0 exp(value / beta)`, `(..., N)`."""
    return (log_prior + values / beta).log_softmax(dim=-1)


def at_kl(family: Callable[[float], Tensor], log_prior: Tensor, nats: float) -> Tensor:
    """
    The member of a family of laws that is `nats` from the prior, averaged over prompts, by bisection.

    Args:
        family (`Callable`): from a temperature to a law `(P, N)`, the closer to the prior the larger it is.
        log_prior (`torch.Tensor`): `(P, N)`.
        nats (`float`): what `KL(p||pi_0)` is to be, or as much of it as the family reaches.
    """
    low, high = math.log(1e-6), math.log(1e9)
    for _ in range(80):
        middle = (low + high) / 2
        if kl(family(math.exp(middle)), log_prior).mean() > nats:
            low = middle
        else:
            high = middle
    return family(math.exp(high))


def beats(log_law: Tensor, log_prior: Tensor, rewards: Tensor) -> Tensor:
    """The win rate against the prior, `(...)`: that a sample has the higher reward, with half of the ties."""
    return expected(log_law, cumulative(log_prior, rewards).middle)


def mixed_by_token(completions: Completions, log_laws: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """
    The law that is drawn token by token from `prod_k p_k(y_t|y_<t)^{c_k}`, normalized at each token, `(P, N)`.

    With coefficients that add up to one it is near `prod_k p_k(y)^{c_k}`, up to the normalizations on the way.

    Args:
        completions ([`~trl_bayes.benchmarks.enumeration.Completions`]): all N.
        log_laws (`list[torch.Tensor]`): `(P, N)` each.
        coefficients (`list[float]`): `c_k`.
    """
    own = completions.ids.masked_fill(~completions.mask, -1)  # (N, T)
    begun = [torch.zeros(len(own), dtype=torch.int64)]  # which prefix of t tokens each completion has, for every t
    begun += [own[:, : t + 1].unique(dim=0, return_inverse=True)[1] for t in range(own.size(1))]
    mixed = torch.zeros_like(log_laws[0])
    for parent, child in pairwise(begun):
        logits = torch.zeros_like(mixed)
        for c, law in zip(coefficients, log_laws, strict=True):
            logits += c * (_mass(law, child) - _mass(law, parent))
        share = 1 / torch.bincount(child).double()[child]  # so that a token counts once, however it goes on
        largest = logits.amax(dim=-1, keepdim=True)
        total = torch.zeros_like(mixed[..., : int(parent.max()) + 1])
        total = total.index_add(-1, parent, (logits - largest).exp() * share)
        mixed += logits - largest - total.log()[..., parent]
    return mixed


def _mass(log_law: Tensor, group: Tensor) -> Tensor:
    """The log-probability of the group of each completion, `(P, N)`."""
    largest = log_law.amax(dim=-1, keepdim=True)
    total = torch.zeros_like(log_law[..., : int(group.max()) + 1])
    return largest + total.index_add(-1, group, (log_law - largest).exp()).log()[..., group]
