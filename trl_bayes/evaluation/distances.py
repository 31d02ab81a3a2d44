"""Distances between a policy and a posterior from their samples: pure functions, checked against exact enumeration.

All are in nats per sequence. `pi_0` is the prior, `phi` the log-potential, `p = pi_0 exp(phi) / Z` the posterior and
`pi` the policy. Averages over the posterior are taken from exact samples of it, or from weighted samples of the prior,
`w = exp(phi) / Z`. A mean over the posterior needs 30 samples for each prompt, by importance sampling 30 effective
ones, as log Z does; otherwise it is marked as not trusted.
"""

import math

import torch
from torch import Tensor

from ..statistics.estimate import Estimate, Means, average, enough_of_each, join_notes, mean_of_each, stratified_mean
from ..statistics.log_z import LogZPerPrompt


def forward_kl(
    log_posterior_unnormalized: Tensor, log_policy: Tensor, prompt_index: Tensor, z: LogZPerPrompt
) -> Estimate:
    """`KL(p||pi) = E_p[log pi_0 + phi - log pi] - log Z` from exact samples of the posterior.

    The samples usually come from those that gave log Z, so the two errors are not independent: for each prompt the
    standard errors are added, which bounds the truth whatever the correlation.

    Args:
        log_posterior_unnormalized: `log pi_0 + phi` (M,) at samples of the posterior.
        log_policy: `log pi` (M,) there; -inf makes the divergence infinite.
        prompt_index: (M,) int64.
        z: log Z of each prompt.
    """
    if log_policy.isneginf().any():
        return Estimate(math.inf, note="the policy never produces some sample of the posterior")
    means = mean_of_each(log_posterior_unnormalized - log_policy, prompt_index, len(z.log_z))
    return minus_log_z(means, z)


def minus_log_z(means: Means, z: LogZPerPrompt) -> Estimate:
    """A mean over posterior samples minus log Z, correlated in an unknown way."""
    enough, note = enough_of_each(means.number, "samples of the posterior")
    variance = (means.variance.sqrt() + z.variance.sqrt()) ** 2
    return average(means.mean - z.log_z, variance, enough and z.trusted, join_notes(note, z.note))


def total_variation(
    log_posterior_unnormalized: Tensor, log_policy: Tensor, prompt_index: Tensor, z: LogZPerPrompt
) -> Estimate:
    """`TV(pi, p) = E_p[(1 - pi/p)_+]`, in [0, 1], from exact samples of the posterior; arguments as [`forward_kl`].

    log Z shifts `pi/p`; its error counts with the derivative `E_p[pi/p; pi < p]` and is added.
    """
    log_ratio = log_policy - log_posterior_unnormalized + z.log_z[prompt_index]
    ratio = log_ratio.double().clamp(max=0.0).exp()  # min(pi/p, 1)
    means = mean_of_each(1 - ratio, prompt_index, len(z.log_z))
    derivative = mean_of_each(torch.where(log_ratio < 0, ratio, 0.0), prompt_index, len(z.log_z)).mean
    enough, note = enough_of_each(means.number, "samples of the posterior")
    variance = (means.variance.sqrt() + derivative * z.variance.sqrt()) ** 2
    return average(means.mean, variance, enough and z.trusted, join_notes(note, z.note))


def weighted_means(
    values: Tensor, phi: Tensor, prompt_index: Tensor, z: LogZPerPrompt, log_z_derivative: float | Tensor = 0.0
) -> Means:
    """Each prompt's `E_p[g]` by importance sampling from the prior: `sum w g / sum w` with `w = exp(phi)`.

    What is estimated may depend on log Z, which the same samples give; the errors are taken together. With w scaled to
    the mean 1, a sample's influence is `w (g - E_p[g]) + c (w - 1)`, c the derivative with respect to log Z, and the
    variance is that of the mean influence (delta method).

    Args:
        values: g (N,) at samples of the prior; not read where the weight is zero, left out where NaN.
        phi: log-potential (N,) of these samples.
        prompt_index: (N,) int64.
        z: log Z of each prompt, from these samples.
        log_z_derivative: c, one for all prompts or (P,).
    """
    num_prompts = len(z.log_z)
    weights = (phi - z.log_z[prompt_index]).exp()  # (N,)
    weights = torch.where(values.isnan() | weights.isnan(), 0.0, weights)
    values = torch.where(weights > 0, values, 0.0).double()
    number = torch.bincount(prompt_index, minlength=num_prompts).double()  # (P,)
    weights = weights / (torch.bincount(prompt_index, weights, num_prompts) / number)[prompt_index]
    mean = torch.bincount(prompt_index, weights * values, num_prompts) / number
    derivative = torch.as_tensor(log_z_derivative, dtype=torch.float64).expand(num_prompts)
    influence = weights * (values - mean[prompt_index]) + derivative[prompt_index] * (weights - 1)
    return Means(mean, torch.bincount(prompt_index, influence**2, num_prompts) / (number * (number - 1)), number)


def weighted_average(means: Means, z: LogZPerPrompt, minus_log_z: bool = False) -> Estimate:
    fewest = z.effective_samples.min().item()
    how = f"by importance sampling; the prompt with the fewest has {fewest:,.0f} effective samples of the posterior"
    values = means.mean - z.log_z if minus_log_z else means.mean
    return average(values, means.variance, z.trusted, how if z.trusted else z.note)


def weighted_forward_kl(
    log_prior: Tensor, log_policy: Tensor, phi: Tensor, prompt_index: Tensor, z: LogZPerPrompt
) -> Estimate:
    """[`forward_kl`] by importance sampling: `sum w (log pi_0 + phi - log pi) / sum w - log Z`.

    Args:
        log_prior, log_policy, phi: (N,) at samples of the prior; `log pi` is not read where phi is -inf.
        prompt_index: (N,) int64.
        z: log Z of each prompt, from these samples.
    """
    if (log_policy.isneginf() & ~phi.isneginf()).any():
        return Estimate(math.inf, note="the policy never produces some sample of the posterior")
    means = weighted_means(log_prior + phi - log_policy, phi, prompt_index, z, log_z_derivative=-1.0)
    return weighted_average(means, z, minus_log_z=True)


def weighted_total_variation(
    log_prior: Tensor, log_policy: Tensor, phi: Tensor, prompt_index: Tensor, z: LogZPerPrompt
) -> Estimate:
    """[`total_variation`] by importance sampling; arguments as [`weighted_forward_kl`]."""
    log_ratio = log_policy - log_prior - phi + z.log_z[prompt_index]
    ratio = log_ratio.clamp(max=0.0).exp()  # min(pi/p, 1)
    derivative = -weighted_means(torch.where(log_ratio < 0, ratio, 0.0), phi, prompt_index, z).mean
    return weighted_average(weighted_means(1 - ratio, phi, prompt_index, z, derivative), z)


def reverse_kl(log_policy: Tensor, log_prior: Tensor, phi: Tensor, prompt_index: Tensor, z: LogZPerPrompt) -> Estimate:
    """`KL(pi||p) = E_pi[log pi - log pi_0 - phi] + log Z` from samples of the policy.

    Infinite as soon as the policy has mass outside the posterior's support (`phi = -inf`): see [`reverse_kl_inside`].
    The policy's samples and log Z are independent, so their variances add up.

    Args:
        log_policy, log_prior, phi: (N,) at samples of the policy, in nats.
        prompt_index: (N,) int64.
        z: log Z of each prompt.
    """
    log_ratio = log_policy - log_prior - phi
    if log_ratio.isposinf().any():
        return Estimate(math.inf, note="the policy has mass outside the posterior's support")
    mean = stratified_mean(log_ratio, prompt_index, len(z.log_z))
    means = mean_of_each(log_ratio, prompt_index, len(z.log_z))
    return average(
        means.mean + z.log_z, means.variance + z.variance, mean.trusted and z.trusted, join_notes(mean.note, z.note)
    )


def reverse_kl_inside(
    log_policy: Tensor, log_prior: Tensor, phi: Tensor, prompt_index: Tensor, z: LogZPerPrompt
) -> Estimate:
    """`KL(pi(.|S)||p)`, the policy conditioned on the posterior's support S: finite where [`reverse_kl`] is not.

        E_pi[log pi - log pi_0 - phi | S] - log pi(S) + log Z

    Given the number of samples inside, their mean and that number are uncorrelated, so the three variances add up.
    Arguments as [`reverse_kl`].
    """
    inside = ~phi.isneginf()
    num_prompts = len(z.log_z)
    count = torch.bincount(prompt_index, minlength=num_prompts).double()  # (P,)
    means = mean_of_each((log_policy - log_prior - phi)[inside], prompt_index[inside], num_prompts)
    share = means.number / count
    share_variance = 1 / means.number - 1 / count  # of log share, by the delta method
    enough, note = enough_of_each(means.number, "samples inside the posterior's support")
    values = means.mean - share.log() + z.log_z
    return average(
        values, means.variance + share_variance + z.variance, enough and z.trusted, join_notes(note, z.note)
    )


def mass_outside(phi: Tensor, prompt_index: Tensor, num_prompts: int) -> Estimate:
    """The policy's probability of completions that the posterior excludes (`phi = -inf`).

    The standard error is that of the proportion with two successes and two failures added (Agresti and Coull), so that
    it is not zero where nothing, or everything, was outside.
    """
    outside = phi.isneginf().double()
    means = mean_of_each(outside, prompt_index, num_prompts)
    smoothed = (means.mean * means.number + 2) / (means.number + 4)
    note = "" if outside.any() else f"none of {len(phi):,} samples"
    return average(means.mean, smoothed * (1 - smoothed) / means.number, note=note)
