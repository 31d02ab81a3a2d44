"""Monte-Carlo estimates of where the policy stands, from the completions of training."""

from typing import NamedTuple

import torch

from ..groups import NEG_INF, finite_exp


class DivergenceEstimates(NamedTuple):
    """Monte-Carlo estimates of where the policy stands, one value per prompt, each of shape `(P,)`, in nats."""

    kl_prior: torch.Tensor
    reverse_kl: torch.Tensor
    forward_kl: torch.Tensor


def divergence_estimates(
    log_policy: torch.Tensor,
    log_prior: torch.Tensor,
    log_target: torch.Tensor,
    log_proposal: torch.Tensor,
    log_z: torch.Tensor,
    valid: torch.Tensor,
) -> DivergenceEstimates:
    """
    Where the policy stands, from the group's own samples `y_i ~ q`, with `rho = pi/q`:

        KL(pi||pi_0) = E_q[rho (log pi - log pi_0)]
        KL(pi||p)    = E_q[rho (log pi - log P)] + log Z
        KL(p||pi)    = E_q[(P/q) (log P - log pi)] / Z - log Z

    Args:
        log_policy, log_prior, log_target, log_proposal (`torch.Tensor`): per-sequence log-probabilities `(P, G)`.
        log_z (`torch.Tensor`): estimate of `log Z` of shape `(P,)` or `(P, G)`.
        valid (`torch.Tensor`): boolean `(P, G)`.

    Returns:
        [`DivergenceEstimates`]: each `(P,)`, in nats. `NaN` where the estimate does not exist: a prompt without
        evidence, or `KL(pi||p)` when a sample lies outside the posterior's support.
    """
    if log_z.dim() == 1:
        log_z = log_z.unsqueeze(1)
    count = valid.sum(dim=1).clamp(min=1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(~valid, 0.0).sum(dim=1) / count

    ratio = finite_exp(log_policy - log_proposal)
    log_p = log_target - log_z  # normalized posterior
    kl_prior = mean(ratio * (log_policy - log_prior))
    reverse_kl = mean(ratio * (log_policy - log_p))
    outside = log_p == NEG_INF
    surprise = (log_p - log_policy).masked_fill(outside, 0.0)  # 0 log 0 = 0
    forward_kl = mean(finite_exp(log_p - log_proposal) * surprise)
    known = valid.any(dim=1) & (log_z > NEG_INF).all(dim=1)

    def where_known(values: torch.Tensor) -> torch.Tensor:
        return torch.where(known & torch.isfinite(values), values, torch.nan)

    return DivergenceEstimates(
        torch.where(valid.any(dim=1), kl_prior, torch.nan), where_known(reverse_kl), where_known(forward_kl)
    )
