"""Baselines: what a completion is compared with, from its siblings alone."""

import torch

from ..divergences import Divergence


def leave_one_out_mean(values: torch.Tensor, valid: torch.Tensor, alone: torch.Tensor | None = None) -> torch.Tensor:
    """
    Baseline of each sample: the mean of its valid siblings' values, shape `(P, G)`.

    The baseline does not depend on the sample, so it leaves the score-function gradient unbiased. A sample without
    siblings is compared with `alone`, of the same shape, such as what it would be worth at the posterior; without that
    it has nothing to be compared with: its baseline is its own value, so that it gives no gradient.
    """
    values = values.masked_fill(~valid, 0.0)
    others = values.sum(dim=1, keepdim=True) - values
    count = valid.sum(dim=1, keepdim=True) - valid.to(torch.long)
    return torch.where(count > 0, others / count.clamp(min=1), values if alone is None else alone)


def leave_one_out_baseline(
    log_ratio: torch.Tensor, log_z: torch.Tensor, valid: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """
    Baseline of f-DPG: the mean of the siblings' pseudo-rewards, all with the evidence that sample `i` has.

        b_i = -mean_{j != i} f'(t_ij),        log t_ij = log pi_j - log P_j + log Z_{-i}.

    With the siblings' own `Z_{-j}`, which contain sample `i`, the baseline would depend on it: that costs several
    times the bias. A sample without siblings is compared with what all are worth at the posterior, `-f'(1)`: the
    baseline of one completion a prompt, whose `Z` comes from elsewhere. With a `Z` from itself it gives no gradient.

    Args:
        log_ratio (`torch.Tensor`): `log pi - log P` of shape `(P, G)`; `+inf` outside the posterior's support.
        log_z (`torch.Tensor`): `log Z_{-i}` of shape `(P, G)`.
        valid (`torch.Tensor`): which can be siblings, boolean `(P, G)`.
        divergence ([`~trl_bayes.divergences.Divergence`]): `f`.

    Returns:
        `torch.Tensor`: shape `(P, G)`, in the units of the pseudo-reward.
    """
    pseudo_rewards = -divergence.slope(log_ratio.unsqueeze(1) + log_z.unsqueeze(2))  # (P, i, j)
    itself = torch.eye(log_ratio.size(1), dtype=torch.bool, device=log_ratio.device)
    siblings = valid.unsqueeze(1) & ~itself
    count = siblings.sum(dim=2)
    mean = pseudo_rewards.masked_fill(~siblings, 0.0).sum(dim=2) / count.clamp(min=1)
    return torch.where(count > 0, mean, -divergence.slope_at_one)
