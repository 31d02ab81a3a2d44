"""Estimators of a posterior from groups of weighted samples: pure tensor functions, shapes `(P, G)`.

`P` prompts have `G` completions each, drawn from a proposal `q` (the policy that generated them). All quantities are
per-sequence log-probabilities in nats. With `P(y|x) = pi_0(y|x) exp(phi(x, y))` the unnormalized posterior,

    log w_i = log P(y_i) - log q(y_i),    Z_hat = mean_i w_i.

`valid` is a boolean mask `(P, G)`: completions that no reward function scored are absent from every sum. Nothing here
knows a model or a trainer, and every function is checked against exact enumeration in `tests/test_estimators.py`.
"""

import math
from typing import NamedTuple

import torch

from .divergences import Divergence
from .statistics.log_z import effective_sample_size as effective_sample_size
from .statistics.log_z import group_log_z as group_log_z


NEG_INF = float("-inf")


class DivergenceEstimates(NamedTuple):
    """Monte-Carlo estimates of where the policy stands, one value per prompt, each of shape `(P,)`, in nats."""

    kl_prior: torch.Tensor
    reverse_kl: torch.Tensor
    forward_kl: torch.Tensor


def finite_exp(x: torch.Tensor) -> torch.Tensor:
    """`e^x`, at most the root of the largest float: what lies beyond is as good as infinite, but must not overflow."""
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) / 2).exp()


def log_weights(log_target: torch.Tensor, log_proposal: torch.Tensor) -> torch.Tensor:
    """
    Importance weights of samples from `q` for the unnormalized posterior: `log w = log P - log q`, in nats.

    Args:
        log_target (`torch.Tensor`):
            `log P = log pi_0 + phi` of shape `(P, G)`; `-inf` outside the posterior's support.
        log_proposal (`torch.Tensor`):
            `log q` of the distribution that the completions were sampled from, shape `(P, G)`.

    Returns:
        `torch.Tensor`: shape `(P, G)`.
    """
    return log_target - log_proposal


def leave_one_out_log_z(
    weights: torch.Tensor,
    valid: torch.Tensor,
    past_log_sum: torch.Tensor | None = None,
    past_count: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Evidence for each sample from all samples but itself: `Z_hat_{-i} = (S + sum_{j != i} w_j) / (N + n - 1)`.

    A sample's own weight in its `Z` shrinks its ratio `w_i / Z_hat`, which biases the gradient; its siblings' do not.
    `S` and `N` are the sum and the number of weights that earlier visits to the same prompt left behind (the `running`
    partition); without them this is the plain leave-one-out estimate.

    A sample that is the only evidence seen so far has no estimate from others (`Z_hat_{-i} = 0`): it gets the
    estimate that includes itself, which bounds its ratio by the number of samples.

    Args:
        weights (`torch.Tensor`): log importance weights `(P, G)`.
        valid (`torch.Tensor`): boolean `(P, G)`.
        past_log_sum (`torch.Tensor`, *optional*): `log S` of shape `(P,)`, `-inf` where there is no past.
        past_count (`torch.Tensor`, *optional*): `N` of shape `(P,)`.

    Returns:
        `torch.Tensor`: shape `(P, G)`; `-inf` only where the prompt has no evidence at all.
    """
    num_prompts, group_size = weights.shape
    if past_log_sum is None or past_count is None:
        past_log_sum = weights.new_full((num_prompts,), NEG_INF)
        past_count = weights.new_zeros(num_prompts)
    weights = weights.masked_fill(~valid, NEG_INF)
    itself = torch.eye(group_size, dtype=torch.bool, device=weights.device)
    siblings = weights.unsqueeze(1).expand(-1, group_size, -1).masked_fill(itself, NEG_INF)  # (P, i, j != i)
    past = past_log_sum.unsqueeze(1)  # (P, 1)
    count = past_count.unsqueeze(1) + valid.sum(dim=1, keepdim=True)  # (P, 1)
    others_count = count - valid.to(count.dtype)  # (P, G)
    from_others = torch.logaddexp(siblings.logsumexp(dim=2), past) - others_count.log()
    from_all = torch.logaddexp(weights.logsumexp(dim=1, keepdim=True), past) - count.log()
    log_z = torch.where((others_count > 0) & (from_others > NEG_INF), from_others, from_all)
    return torch.where(count > 0, log_z, NEG_INF)


def vargrad_log_z(log_ratio: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """
    The constant that fits the siblings' squared log-ratio best: `argmin_C sum_{j != i} (log pi_j - log P_j + C)^2`.

    It is their mean of `log P - log pi`, a lower bound of `log Z` that is tight at the posterior. With it, trajectory
    balance has exactly the gradient of `KL(pi||p)` ([VarGrad](https://huggingface.co/papers/2010.10436)).

    Args:
        log_ratio (`torch.Tensor`): `log pi - log P` of shape `(P, G)`, finite.
        valid (`torch.Tensor`): boolean `(P, G)`.

    Returns:
        `torch.Tensor`: shape `(P, G)`.
    """
    return -leave_one_out_mean(log_ratio, valid)


def leave_one_out_mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """
    Baseline of each sample: the mean of its valid siblings' values, shape `(P, G)`.

    The baseline does not depend on the sample, so it leaves the score-function gradient unbiased. A sample without
    siblings has nothing to be compared with: its baseline is its own value, so that it gives no gradient.
    """
    values = values.masked_fill(~valid, 0.0)
    others = values.sum(dim=1, keepdim=True) - values
    count = valid.sum(dim=1, keepdim=True) - valid.to(torch.long)
    return torch.where(count > 0, others / count.clamp(min=1), values)


def leave_one_out_baseline(
    log_ratio: torch.Tensor, log_z: torch.Tensor, valid: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """
    Baseline of f-DPG: the mean of the siblings' pseudo-rewards, all with the evidence that sample `i` has.

        b_i = -mean_{j != i} f'(t_ij),        log t_ij = log pi_j - log P_j + log Z_{-i}.

    With the siblings' own `Z_{-j}`, which contain sample `i`, the baseline would depend on it: that costs several
    times the bias. A sample without siblings gets its own pseudo-reward, so that it gives no gradient.

    Args:
        log_ratio (`torch.Tensor`): `log pi - log P` of shape `(P, G)`; `+inf` outside the posterior's support.
        log_z (`torch.Tensor`): `log Z_{-i}` of shape `(P, G)`.
        valid (`torch.Tensor`): boolean `(P, G)`.
        divergence ([`~trl_bayes.divergences.Divergence`]): `f`.

    Returns:
        `torch.Tensor`: shape `(P, G)`, in the units of the pseudo-reward.
    """
    pseudo_rewards = -divergence.slope(log_ratio.unsqueeze(1) + log_z.unsqueeze(2))  # (P, i, j)
    itself = torch.eye(log_ratio.size(1), dtype=torch.bool, device=log_ratio.device)
    siblings = valid.unsqueeze(1) & ~itself
    count = siblings.sum(dim=2)
    mean = pseudo_rewards.masked_fill(~siblings, 0.0).sum(dim=2) / count.clamp(min=1)
    return torch.where(count > 0, mean, pseudo_rewards.diagonal(dim1=1, dim2=2))


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


def score_function_coefficient(
    log_policy: torch.Tensor,
    log_target: torch.Tensor,
    log_proposal: torch.Tensor,
    log_z: torch.Tensor,
    baseline: torch.Tensor,
    divergence: Divergence,
) -> torch.Tensor:
    """
    f-DPG: the factor of `grad log pi(y)` in `grad D_f(pi||p) = E_q[(pi/q) (f'(t) + b) grad log pi]`, `t = pi/p`.

    `b` is a baseline of the pseudo-reward `-f'(t)`, so the factor is minus the centered pseudo-reward times the
    importance ratio. See [Aligning Language Models with Preferences through f-divergence
    Minimization](https://huggingface.co/papers/2302.08215).

    Args:
        log_policy, log_target, log_proposal, log_z, baseline (`torch.Tensor`): same shape, in nats.
        divergence ([`~trl_bayes.divergences.Divergence`]): `f`.

    Returns:
        `torch.Tensor`: same shape.
    """
    slope = divergence.slope(log_policy - log_target + log_z)
    return finite_exp(log_policy - log_proposal) * (slope + baseline)


def importance_coefficient(
    log_policy: torch.Tensor, log_target: torch.Tensor, log_proposal: torch.Tensor, log_z: torch.Tensor
) -> torch.Tensor:
    """
    DPG: the factor of `grad log pi(y)` in `grad KL(p||pi) = -E_q[(P/(q Z) - pi/q) grad log pi]`.

    The first weight does not depend on the policy, so samples of any recorded `q` can be reused. The second is a
    control variate: its expectation is `E_pi[grad log pi] = 0`, and at the posterior both cancel sample by sample.
    See [A Distributional Approach to Controlled Text Generation](https://huggingface.co/papers/2012.11635).

    Args:
        log_policy, log_target, log_proposal, log_z (`torch.Tensor`): same shape, in nats.

    Returns:
        `torch.Tensor`: same shape.
    """
    return finite_exp(log_policy - log_proposal) - finite_exp(log_target - log_z - log_proposal)


def trajectory_balance_coefficient(
    log_policy: torch.Tensor, log_target: torch.Tensor, log_z: torch.Tensor, divergence: Divergence
) -> torch.Tensor:
    """
    f-TB: the derivative of the loss `L_f(log pi - log P + log Z)` in `log pi`, which is `f'(t) - f'(1)`.

    No importance ratio: with any `q` that covers the posterior's support the minimum stays at `pi = p`. See
    https://huggingface.co/papers/2605.15417.

    Args:
        log_policy, log_target, log_z (`torch.Tensor`): same shape, in nats.
        divergence ([`~trl_bayes.divergences.Divergence`]): `f`.

    Returns:
        `torch.Tensor`: same shape.
    """
    return divergence.loss_slope(log_policy - log_target + log_z)
