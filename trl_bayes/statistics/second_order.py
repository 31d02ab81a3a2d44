"""Divergences from a group's own samples whose error is of second order next to the posterior, shapes (P, G).

For metrics of training, where a group of completions is all there is. What evaluation estimates from two sets of
samples is in [`trl_bayes.evaluation.distances`].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..groups import finite_exp
from .control_variates import best_coefficient


class SecondOrderDivergences(NamedTuple):
    """Of each prompt, (P,) in nats; NaN where there is no estimate."""

    reverse_kl: Tensor
    forward_kl: Tensor


def second_order_divergences(
    log_policy: Tensor, log_posterior: Tensor, log_proposal: Tensor, valid: Tensor
) -> SecondOrderDivergences:
    """
    From samples of q, with `rho = pi/q` and `w = p/q`:

        KL(pi||p) = E_q[rho (log pi - log p) + c (w - rho)],    KL(p||pi) = E_q[w (log p - log pi) - c (w - rho)]

    The control variate `w - rho` has the mean zero if Z is the true one. At the posterior c = 1 cancels the error of
    first order; far from it a large w makes it noisy. So c in [0, 1] is fitted, for each sample to all others of all
    groups: it does not see the sample, and the estimate stays unbiased. Where the samples do not see the posterior,
    which is where their effective number is below a quarter or the mean of w far from 1, c is 0 for KL(pi||p), and 1
    for KL(p||pi), which then is `w log w - w + 1` on-policy: below 0 for no sample. The mean of w over a
    group from which Z itself was estimated is 1: then next to nothing is added, and KL(pi||p) is too small by half of
    the variance of log Z.

    Args:
        log_policy, log_posterior, log_proposal (`torch.Tensor`): per-sequence log-probabilities (P, G); that of the
            posterior is `log pi_0 + phi - log Z`, and -inf outside its support.
        valid (`torch.Tensor`): boolean (P, G).

    Returns:
        [`SecondOrderDivergences`]: NaN for a prompt without a valid sample, and KL(pi||p) where a sample lies outside
        the posterior's support.
    """
    ratio, weight = finite_exp(log_policy - log_proposal), finite_exp(log_posterior - log_proposal)
    surprise = (log_policy - log_posterior).masked_fill(weight == 0, 0.0)  # 0 log 0 = 0
    outside = valid & (log_posterior == -torch.inf) & (ratio > 0)
    control = weight - ratio
    trusted = _sees_posterior(weight[valid])
    reverse = _controlled_mean(ratio * surprise, control, valid, None if trusted else 0.0)
    forward = _controlled_mean(-weight * surprise, -control, valid, None if trusted else 1.0)
    return SecondOrderDivergences(reverse.masked_fill(outside.any(dim=1), torch.nan), forward)


def _sees_posterior(weight: Tensor) -> bool:
    """Whether w = p/q of all samples, (N,), is near its mean of 1 with few exceptions."""
    mean, effective = weight.mean(), weight.sum().square() / weight.square().sum() / max(weight.numel(), 1)
    return bool((mean >= 0.5) & (mean <= 2) & (effective >= 0.25))


def _controlled_mean(values: Tensor, control: Tensor, valid: Tensor, coefficient: float | None) -> Tensor:
    """
    `mean(values + c control)` of each group (P,), with c from the other samples of all if none is given; NaN without a
    valid sample.
    """
    count = valid.sum(dim=1, keepdim=True)  # (P, 1)
    values, control = (v.masked_fill(~valid, 0.0) for v in (values, control))
    if coefficient is not None:
        values = values + coefficient * control
    else:
        x, y = (torch.where(valid, v - v.sum(dim=1, keepdim=True) / count, 0.0) for v in (values, control))
        own = count / (count - 1).clamp(min=1)  # what a sample takes part in a sum of centered squares
        covariance, variance = ((v * y).sum() - own * v * y for v in (x, y))  # (P, G)
        values = values + best_coefficient(covariance, variance) * control
    return values.sum(dim=1) / count.squeeze(1)
