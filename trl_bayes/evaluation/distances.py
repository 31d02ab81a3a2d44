"""Distances between a policy and a posterior from their samples: pure functions, checked against exact enumeration.

All are in nats per sequence. `pi_0` is the prior, `phi` the log-potential, `p = pi_0 exp(phi) / Z` the posterior, `pi`
the policy and `u = log pi - log p`. There are two independent sets of samples: those of the policy, and those of the
prior, which give log Z and of which some, or all with weights, stand for the posterior.

**Second order.** Next to the posterior u is small, and what the plain means `E_pi[u]` and `E_p[-u]` estimate is of
second order in u, but their errors are of first order, as is that of log Z. With a control variate they are of second
order too:

    KL(pi||p) = E_pi[u + c (e^-u - 1)],    KL(p||pi) = E_p[-u + c (e^u - 1)],    TV = E_p[(1 - e^u)_+ + c (e^u - 1)]

since `E_pi[e^-u] = E_p[e^u] = 1`. So that it has a finite variance, and is right where one of the two has mass that
the other lacks, the exponential counts up to a bound B, the square root of the number of samples, and what is beyond
is counted among the other's samples: `E_pi[e^-u; e^-u <= B] = P_p[e^-u <= B]`. The coefficient c in [0, 1] is fitted
to make the error smallest ([`trl_bayes.statistics.control_variates`]).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..statistics.control_variates import Influence, controlled
from ..statistics.estimate import Estimate, Means, average, enough_of_each, join_notes, mean_of_each, stratified_mean
from ..statistics.log_z import LogZPerPrompt


class PosteriorSamples(NamedTuple):
    """N samples of the prior that stand for the posterior, as far as they have a share."""

    log_ratio: Tensor
    """u (N,), of any value where the share is 0."""
    shares: Tensor
    """(N,) how much each counts in a mean over the posterior: 1 or 0 where they were accepted or not, or weights."""
    weights: Tensor
    """(N,) `exp(phi)`, up to a factor for each prompt: what each contributes to Z."""
    prompt_index: Tensor


class PolicySamples(NamedTuple):
    """n samples of the policy."""

    log_ratio: Tensor
    """u (n,), +inf outside the posterior's support."""
    prompt_index: Tensor


class _Side(NamedTuple):
    """One of the two sets, with shares and weights whose mean is 1 in each prompt."""

    log_ratio: Tensor
    shares: Tensor
    shift: Tensor  # influence of each sample on all u of its prompt, through log Z or a conditional probability
    prompt_index: Tensor

    def mean(self, values: Tensor, num_prompts: int) -> Tensor:
        number = torch.bincount(self.prompt_index, minlength=num_prompts)
        return torch.bincount(self.prompt_index, self.shares * values, num_prompts) / number

    def unseen_variance(self, share: Tensor) -> Tensor:
        """
        The variance of a share of the samples (P,) beyond the plain one, which is 0 where the share is none or all.

        It is that of the share with half a sample added to either part (Jeffreys).
        """
        squares = torch.bincount(self.prompt_index, self.shares**2, len(share))
        number = torch.bincount(self.prompt_index, self.shares, len(share)) ** 2 / squares  # the effective one
        smoothed = (share * number + 0.5) / (number + 1)
        return (smoothed * (1 - smoothed) / (number + 1) - share * (1 - share) / number).clamp(min=0)

    def bias(self, centered: Tensor, centered_slope: Tensor, num_prompts: int) -> Tensor:
        """
        Bias (P,) of a mean that is a ratio, and that depends on a shift which the same samples give; of order 1/N.

        Args:
            centered, centered_slope: what the mean is of, and its derivative by the shift, less their means; (N,).
        """
        number = torch.bincount(self.prompt_index, minlength=num_prompts)
        each = self.shares * (centered_slope * self.shift - self.shares * centered)
        return torch.bincount(self.prompt_index, each, num_prompts) / number**2


def forward_kl(samples: PosteriorSamples, z: LogZPerPrompt, policy: PolicySamples | None = None) -> Estimate:
    """
    `KL(p||pi) = E_p[log p - log pi]`.

    Args:
        samples ([`PosteriorSamples`]): with log pi at those of the posterior.
        z ([`~trl_bayes.statistics.log_z.LogZPerPrompt`]): log Z of each prompt, from the same samples.
        policy ([`PolicySamples`], *optional*): independent ones, without which there is no control variate.
    """
    if (samples.log_ratio.isneginf() & (samples.shares > 0)).any():
        return Estimate(math.inf, note="the policy never produces some sample of the posterior")
    near = _side_of_posterior(samples, len(z.log_z))
    slope = torch.full_like(near.log_ratio, -1.0)
    return _over_posterior(-near.log_ratio, slope, samples, near, z, policy)


def total_variation(samples: PosteriorSamples, z: LogZPerPrompt, policy: PolicySamples | None = None) -> Estimate:
    """`TV(pi, p) = E_p[(1 - pi/p)_+]`, in [0, 1]; arguments as [`forward_kl`]."""
    near = _side_of_posterior(samples, len(z.log_z))
    ratio = near.log_ratio.clamp(max=0.0).exp()  # min(pi/p, 1)
    slope = torch.where(near.log_ratio < 0, -ratio, 0.0)
    return _over_posterior(1 - ratio, slope, samples, near, z, policy)


def reverse_kl(policy: PolicySamples, z: LogZPerPrompt, samples: PosteriorSamples) -> Estimate:
    """
    `KL(pi||p) = E_pi[log pi - log p]`.

    Infinite as soon as the policy has mass outside the posterior's support (`phi = -inf`): see [`reverse_kl_inside`].

    Args:
        policy ([`PolicySamples`]): independent of log Z.
        z ([`~trl_bayes.statistics.log_z.LogZPerPrompt`]): log Z of each prompt.
        samples ([`PosteriorSamples`]): those that gave log Z, with log pi at those of the posterior.
    """
    if policy.log_ratio.isposinf().any():
        return Estimate(math.inf, note="the policy has mass outside the posterior's support")
    plain = stratified_mean(policy.log_ratio, policy.prompt_index, len(z.log_z))
    ones = torch.ones_like(policy.log_ratio)
    near = _Side(policy.log_ratio, ones, torch.zeros_like(ones), policy.prompt_index)
    return _over_policy(near, samples, z, torch.zeros(()), plain.trusted, plain.note)


def reverse_kl_inside(policy: PolicySamples, z: LogZPerPrompt, samples: PosteriorSamples) -> Estimate:
    """`KL(pi(.|S)||p)`, the policy conditioned on the posterior's support S: finite where [`reverse_kl`] is not.

        E_pi[log pi - log p | S] - log pi(S)

    Arguments as [`reverse_kl`].
    """
    inside, index, num_prompts = ~policy.log_ratio.isposinf(), policy.prompt_index, len(z.log_z)
    shares = _relative(inside.double(), index, num_prompts)
    number = torch.bincount(index[inside], minlength=num_prompts).double()
    count = torch.bincount(index, minlength=num_prompts)
    log_inside = (number / count).log()  # (P,) of pi(S)
    log_ratio = torch.where(inside, policy.log_ratio, 0.0) - log_inside[index]
    samples = samples._replace(log_ratio=samples.log_ratio - log_inside[samples.prompt_index])
    enough, note = enough_of_each(number, "samples inside the posterior's support")
    near = _Side(log_ratio, shares, 1 - shares, index)
    return _over_policy(near, samples, z, 1 / number - 1 / count, enough, note)


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


def posterior_means(
    values: Tensor, samples: PosteriorSamples, num_prompts: int, log_z_coefficient: float = 0.0
) -> Means:
    """
    `E_p[g] + k log Z` of each prompt, without its second term, and the variance of both together.

    Args:
        values (`torch.Tensor`): g (N,); not read where the share is 0, left out where NaN.
        samples ([`PosteriorSamples`]): those that gave log Z, too.
        num_prompts (`int`): P.
        log_z_coefficient (`float`, *optional*, defaults to `0.0`): k.
    """
    shares = torch.where(values.isnan(), 0.0, samples.shares)
    side = _side_of_posterior(samples._replace(shares=shares), num_prompts)
    values = torch.where(shares > 0, values, 0.0).double()
    mean = side.mean(values, num_prompts)
    influence = side.shares * (values - mean[side.prompt_index]) + log_z_coefficient * side.shift
    number = torch.bincount(side.prompt_index, minlength=num_prompts).double()
    variance = torch.bincount(side.prompt_index, influence**2, num_prompts) / (number * (number - 1))
    return Means(mean, variance, number)


# ---------------------------------------------------------------------------------------------------------------------
# The estimate of all three


def _over_posterior(
    values: Tensor,
    slope: Tensor,
    samples: PosteriorSamples,
    near: _Side,
    z: LogZPerPrompt,
    policy: PolicySamples | None,
) -> Estimate:
    """A mean over the posterior with the control variate `e^u - 1`."""
    far = None
    if policy is not None:
        ones = torch.ones_like(policy.log_ratio)
        far = _Side(policy.log_ratio, ones, torch.zeros_like(ones), policy.prompt_index)
    value, variance = _controlled(values, slope, 1, near, far, z, torch.zeros(()))
    trusted, note = trust_in_posterior(samples, z)
    return average(value, variance, trusted, note)


def trust_in_posterior(samples: PosteriorSamples, z: LogZPerPrompt) -> tuple[bool, str]:
    """Whether there are enough samples for a mean over the posterior and for log Z, and a note."""
    is_weighted = not ((samples.shares == 0) | (samples.shares == 1)).all()
    if is_weighted:
        fewest = z.effective_samples.min().item()
        how = (
            f"by importance sampling; the prompt with the fewest has {fewest:,.0f} effective samples of the posterior"
        )
        return z.trusted, how if z.trusted else z.note
    number = torch.bincount(samples.prompt_index, samples.shares, len(z.log_z))
    enough, note = enough_of_each(number, "samples of the posterior")
    return enough and z.trusted, join_notes(note, z.note)


def _over_policy(
    near: _Side, samples: PosteriorSamples, z: LogZPerPrompt, share_variance: Tensor, trusted: bool, note: str
) -> Estimate:
    """A mean over the policy with the control variate `e^-u - 1`."""
    far = _side_of_posterior(samples, len(z.log_z))
    slope = torch.ones_like(near.log_ratio)
    value, variance = _controlled(near.log_ratio, slope, -1, near, far, z, share_variance)
    return average(value, variance, trusted and z.trusted, join_notes(note, z.note))


def _controlled(
    values: Tensor,
    slope: Tensor,
    sign: int,
    near: _Side,
    far: _Side | None,
    z: LogZPerPrompt,
    share_variance: Tensor,
) -> tuple[Tensor, Tensor]:
    """
    `E[g(u)] + c (E[e^(sign u)] - 1)` over the near side, (P,), and its variance (P,).

    A common shift of all u, which errors of log Z and of a conditional probability are, has an effect of first order,
    `G' + c sign H` with the means G' of the slope and H of the exponential, and one of second order, `c H / 2`.

    Args:
        values, slope: g and g' (N,) at the near side's samples.
        share_variance: (P,) or a scalar, of the log of the probability that the near side is conditioned on.
    """
    num_prompts, index = len(z.log_z), near.prompt_index
    mean, steepness = near.mean(values, num_prompts), near.mean(slope, num_prompts)
    x = near.shares * (values - mean[index]) + steepness[index] * near.shift
    if far is None:
        return controlled(mean, torch.zeros_like(mean), [Influence(x, torch.zeros_like(x), index)])[:2]
    bound = torch.bincount(index, minlength=num_prompts).double().log() / 2  # (P,) log B
    exponential = torch.where(sign * near.log_ratio <= bound[index], (sign * near.log_ratio).exp(), 0.0)
    height = near.mean(exponential, num_prompts)
    beyond = (sign * far.log_ratio > bound[far.prompt_index]).double()
    share_beyond = far.mean(beyond, num_prompts)
    centered = exponential - height[index]
    y = near.shares * centered + sign * height[index] * near.shift
    far_x = steepness[far.prompt_index] * far.shift
    far_centered = beyond - share_beyond[far.prompt_index]
    far_y = far.shares * far_centered + sign * height[far.prompt_index] * far.shift
    influences = [Influence(x, y, index), Influence(far_x, far_y, far.prompt_index)]
    value, variance, c = controlled(mean, height + share_beyond - 1, influences, far.unseen_variance(share_beyond))
    # Biases of order 1/N count where the error of first order is gone. E[log Z_hat - log Z] is -Var / 2
    z_variance = z.variance.nan_to_num(nan=0.0)
    first, second = (share_variance - z_variance) / 2, (share_variance + z_variance) / 2
    bias = steepness * first + near.bias(values - mean[index], slope - steepness[index], num_prompts)
    control_bias = sign * height * first + height * second + near.bias(centered, sign * centered, num_prompts)
    control_bias = control_bias + far.bias(far_centered, torch.zeros_like(far_centered), num_prompts)
    return value - bias - c * control_bias, variance + 2 * (c * height * second) ** 2


def _side_of_posterior(samples: PosteriorSamples, num_prompts: int) -> _Side:
    log_ratio = torch.where(samples.shares > 0, samples.log_ratio, 0.0)
    shares, weights = (_relative(v, samples.prompt_index, num_prompts) for v in (samples.shares, samples.weights))
    return _Side(log_ratio.double(), shares, weights - 1, samples.prompt_index)


def _relative(values: Tensor, prompt_index: Tensor, num_prompts: int) -> Tensor:
    """Values (N,) over their mean in each prompt."""
    number = torch.bincount(prompt_index, minlength=num_prompts)
    mean = torch.bincount(prompt_index, values.double(), num_prompts) / number
    return values / mean[prompt_index]
