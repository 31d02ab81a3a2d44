"""How far a policy is from a posterior, estimated from samples, each number with its standard error.

All distances are in nats per sequence. Prompts are strata: a quantity is estimated for each prompt and then averaged
over the prompts, `mean_p a_p`, with the standard error `sqrt(sum_p se_p^2) / P`. Arrays of samples are flat, `(N,)`,
with `prompt_index` (N,) saying whose they are. `pi_0` is the prior, `phi` the log-potential, `p = pi_0 exp(phi) / Z`
the posterior and `pi` the policy.

The prior is sampled once ([`draw_prior`]). Where the evidence is bounded, samples of the prior become exact samples of
the posterior by rejection; otherwise they are weighted, `w = exp(phi) / Z` ([`condition`]). Both serve for every
policy ([`evaluate`]). The functions between are pure, and checked against exact enumeration in
`tests/evaluation/test_evaluate.py`.

What cannot be trusted is marked so (`Estimate.trusted`), with the reason in `note`:

 - `log Z` needs an effective sample size of at least 30 for each prompt; and if the largest possible evidence is
   known, the weights must add up to at least 3 times the largest possible one. Otherwise an outcome too rare to have
   been seen (probability below 3/N, at 95 %) could double Z.
 - A mean needs at least 30 samples in all and 2 for each prompt; one over the posterior 30 for each prompt, by
   importance sampling 30 effective ones, as log Z.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..language_models.samples import Prompt, RewardFunction, Samples, log_probs, sample, score
from ..prior import PriorModel, sample_prior
from ..targets import Context, PriorScores, Target
from ..targets.base import weighted_sum
from .diversity import distinct_n, jackknife_standard_error, self_bleu, share_distinct
from .pass_at_k import pass_at_k


MIN_EFFECTIVE_SAMPLES = 30
MIN_WEIGHT_OF_BOUND = 3


class Estimate(NamedTuple):
    """A number estimated from samples.

    `value` may be infinite, or NaN where there is no estimate; `standard_error` is NaN where it has none. `trusted` is
    False for a number that should not be read as one, and `note` says why, or how to read it.
    """

    value: float
    standard_error: float = math.nan
    trusted: bool = True
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: a number that is not finite is `null`, with its name in `value_is`."""
        value, standard_error = float(self.value), float(self.standard_error)
        record = {
            "value": value if math.isfinite(value) else None,
            "standard_error": standard_error if math.isfinite(standard_error) else None,
            "trusted": bool(self.trusted),
            "note": self.note,
        }
        return record if math.isfinite(value) else {**record, "value_is": str(value)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Estimate":
        """What [`~Estimate.to_dict`] wrote."""
        value, standard_error = record.get("value"), record.get("standard_error")
        return cls(
            float(record.get("value_is", "nan")) if value is None else float(value),
            math.nan if standard_error is None else float(standard_error),
            bool(record.get("trusted", True)),
            str(record.get("note", "")),
        )


class LogZPerPrompt(NamedTuple):
    """log Z of each prompt, `(P,)`, with the variance of the estimate and the effective number of samples."""

    log_z: Tensor
    variance: Tensor
    effective_samples: Tensor
    trusted: bool
    note: str


class _Means(NamedTuple):
    """Mean of each prompt's values, the variance of that mean, and the number of values, each `(P,)`."""

    mean: Tensor
    variance: Tensor
    number: Tensor


def _means(values: Tensor, prompt_index: Tensor, num_prompts: int) -> _Means:
    """A prompt without values has the mean NaN, one with a single value the variance NaN."""
    values = values.double()
    count = torch.bincount(prompt_index, minlength=num_prompts).double()
    mean = torch.bincount(prompt_index, weights=values, minlength=num_prompts) / count
    squares = (values - mean[prompt_index]) ** 2
    variance = torch.bincount(prompt_index, weights=squares, minlength=num_prompts) / (count - 1)
    return _Means(mean, torch.where(count > 1, variance, torch.nan) / count, count)


def _average(values: Tensor, variance: Tensor, trusted: bool = True, note: str = "") -> Estimate:
    """The mean over prompts of independent estimates, `(P,)` each."""
    value, standard_error = values.mean().item(), variance.sum().sqrt().item() / len(values)
    if math.isnan(value):
        trusted, note = False, note or "no samples for some prompt"
    return Estimate(value, standard_error, trusted, note)


def _joint(*notes: str) -> str:
    return "; ".join(dict.fromkeys(note for note in notes if note))


def stratified_mean(values: Tensor, prompt_index: Tensor, num_prompts: int) -> Estimate:
    """The mean over prompts of each prompt's mean.

    Args:
        values: (N,); an infinite one makes the mean infinite.
        prompt_index: (N,) int64, from 0 to num_prompts - 1.
        num_prompts: P.
    """
    if values.isinf().any():
        return Estimate(values[values.isinf()].sum().item(), note="infinite for some sample")
    means = _means(values, prompt_index, num_prompts)
    enough = bool((means.number >= 2).all()) and means.number.sum().item() >= MIN_EFFECTIVE_SAMPLES
    return _average(means.mean, means.variance, enough, "" if enough else "too few samples")


def _enough_for_each(count: Tensor, what: str) -> tuple[bool, str]:
    fewest = int(count.min().item())
    if fewest >= MIN_EFFECTIVE_SAMPLES:
        return True, ""
    return False, f"only {fewest} {what} for some prompt"


def log_z_per_prompt(
    phi: Tensor, prompt_index: Tensor, num_prompts: int, max_log_potential: float | None = None
) -> LogZPerPrompt:
    """Evidence from prior samples: `log Z_p = log mean_i exp(phi_i)`, with the variance `1/ESS - 1/N` (delta method).

    Args:
        phi: log-potential (N,) of samples of the prior, in nats; -inf where there is none.
        prompt_index: (N,) int64.
        num_prompts: P.
        max_log_potential: the largest phi that any completion could have, if it is known.

    Raises:
        ValueError: phi with NaN or +inf, or above `max_log_potential`.
    """
    phi = phi.double()
    _check_evidence(phi, max_log_potential)
    count = torch.bincount(prompt_index, minlength=num_prompts).double()  # (P,)
    largest = torch.full((num_prompts,), -torch.inf, dtype=torch.float64)
    largest = largest.scatter_reduce(0, prompt_index, phi, "amax")  # (P,)
    shift = torch.where(largest.isneginf(), 0.0, largest)
    weights = (phi - shift[prompt_index]).exp()  # (N,), at most 1
    total = torch.bincount(prompt_index, weights=weights, minlength=num_prompts)
    squares = torch.bincount(prompt_index, weights=weights**2, minlength=num_prompts)
    effective = torch.where(squares > 0, total**2 / squares, 0.0)
    variance = (1 / effective - 1 / count).clamp(min=0) * count / (count - 1).clamp(min=1)
    variance = torch.where(effective > 0, variance, torch.nan)
    trusted, note = _enough_for_each(effective, "effective samples of the posterior")
    if trusted and max_log_potential is not None:
        of_bound = (total.log() + shift - max_log_potential).exp().min().item()
        if of_bound < MIN_WEIGHT_OF_BOUND:
            trusted, note = False, "an outcome too rare to have been seen could double Z for some prompt"
    return LogZPerPrompt(total.log() + shift - count.log(), variance, effective, trusted, note)


def _check_evidence(phi: Tensor, max_log_potential: float | None) -> None:
    if phi.isnan().any() or phi.isposinf().any():
        raise ValueError("The log-potential must be below +inf and not NaN: leave out samples without any reward.")
    if max_log_potential is not None and phi.numel() and phi.max().item() > max_log_potential + 1e-9:
        raise ValueError(
            f"A sample has the log-potential {phi.max().item():.6g}, above "
            f"`max_log_potential={max_log_potential:.6g}`: give a bound that holds for every completion."
        )


def estimate_log_z(
    phi: Tensor, prompt_index: Tensor, num_prompts: int, max_log_potential: float | None = None
) -> Estimate:
    """The mean over prompts of log Z; arguments and errors as [`log_z_per_prompt`]."""
    return _average_log_z(log_z_per_prompt(phi, prompt_index, num_prompts, max_log_potential))


def _average_log_z(partition: LogZPerPrompt) -> Estimate:
    return _average(partition.log_z, partition.variance, partition.trusted, partition.note)


def rejection(phi: Tensor, max_log_potential: float, seed: int = 0) -> Tensor:
    """Exact samples of the posterior among samples of the prior: each is kept with probability `exp(phi - max phi)`.

    For evidence that is 0 or 1 (`phi` is -inf or 0, the bound 0) that means: keep what has evidence.

    Args:
        phi: (N,) of independent samples of the prior.
        max_log_potential: the largest phi that any completion could have.
        seed: of the decisions.

    Returns:
        The indices (M,) int64 of the samples kept, in order.

    Raises:
        ValueError: phi with NaN or above the bound.
    """
    phi = phi.double()
    _check_evidence(phi, max_log_potential)
    # Not torch's generator: the samples may have been drawn with the same seed, and the decisions would follow them
    uniform = torch.from_numpy(numpy.random.default_rng(seed).random(len(phi)))
    return torch.nonzero(uniform < (phi - max_log_potential).exp()).squeeze(1)


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
    means = _means(log_posterior_unnormalized - log_policy, prompt_index, len(z.log_z))
    return _minus_log_z(means, z)


def _minus_log_z(means: _Means, z: LogZPerPrompt) -> Estimate:
    """A mean over posterior samples minus log Z, correlated in an unknown way."""
    enough, note = _enough_for_each(means.number, "samples of the posterior")
    variance = (means.variance.sqrt() + z.variance.sqrt()) ** 2
    return _average(means.mean - z.log_z, variance, enough and z.trusted, _joint(note, z.note))


def total_variation(
    log_posterior_unnormalized: Tensor, log_policy: Tensor, prompt_index: Tensor, z: LogZPerPrompt
) -> Estimate:
    """`TV(pi, p) = E_p[(1 - pi/p)_+]`, in [0, 1], from exact samples of the posterior; arguments as [`forward_kl`].

    log Z shifts `pi/p`; its error counts with the derivative `E_p[pi/p; pi < p]` and is added.
    """
    log_ratio = log_policy - log_posterior_unnormalized + z.log_z[prompt_index]
    ratio = log_ratio.double().clamp(max=0.0).exp()  # min(pi/p, 1)
    means = _means(1 - ratio, prompt_index, len(z.log_z))
    derivative = _means(torch.where(log_ratio < 0, ratio, 0.0), prompt_index, len(z.log_z)).mean
    enough, note = _enough_for_each(means.number, "samples of the posterior")
    variance = (means.variance.sqrt() + derivative * z.variance.sqrt()) ** 2
    return _average(means.mean, variance, enough and z.trusted, _joint(note, z.note))


def _weighted_means(
    values: Tensor, phi: Tensor, prompt_index: Tensor, z: LogZPerPrompt, log_z_derivative: float | Tensor = 0.0
) -> _Means:
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
    return _Means(mean, torch.bincount(prompt_index, influence**2, num_prompts) / (number * (number - 1)), number)


def _weighted_average(means: _Means, z: LogZPerPrompt, minus_log_z: bool = False) -> Estimate:
    fewest = z.effective_samples.min().item()
    how = f"by importance sampling; the prompt with the fewest has {fewest:,.0f} effective samples of the posterior"
    values = means.mean - z.log_z if minus_log_z else means.mean
    return _average(values, means.variance, z.trusted, how if z.trusted else z.note)


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
    means = _weighted_means(log_prior + phi - log_policy, phi, prompt_index, z, log_z_derivative=-1.0)
    return _weighted_average(means, z, minus_log_z=True)


def weighted_total_variation(
    log_prior: Tensor, log_policy: Tensor, phi: Tensor, prompt_index: Tensor, z: LogZPerPrompt
) -> Estimate:
    """[`total_variation`] by importance sampling; arguments as [`weighted_forward_kl`]."""
    log_ratio = log_policy - log_prior - phi + z.log_z[prompt_index]
    ratio = log_ratio.clamp(max=0.0).exp()  # min(pi/p, 1)
    derivative = -_weighted_means(torch.where(log_ratio < 0, ratio, 0.0), phi, prompt_index, z).mean
    return _weighted_average(_weighted_means(1 - ratio, phi, prompt_index, z, derivative), z)


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
    means = _means(log_ratio, prompt_index, len(z.log_z))
    return _average(
        means.mean + z.log_z, means.variance + z.variance, mean.trusted and z.trusted, _joint(mean.note, z.note)
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
    means = _means((log_policy - log_prior - phi)[inside], prompt_index[inside], num_prompts)
    share = means.number / count
    share_variance = 1 / means.number - 1 / count  # of log share, by the delta method
    enough, note = _enough_for_each(means.number, "samples inside the posterior's support")
    values = means.mean - share.log() + z.log_z
    return _average(values, means.variance + share_variance + z.variance, enough and z.trusted, _joint(note, z.note))


def mass_outside(phi: Tensor, prompt_index: Tensor, num_prompts: int) -> Estimate:
    """The policy's probability of completions that the posterior excludes (`phi = -inf`).

    The standard error is that of the proportion with two successes and two failures added (Agresti and Coull), so that
    it is not zero where nothing, or everything, was outside.
    """
    outside = phi.isneginf().double()
    means = _means(outside, prompt_index, num_prompts)
    smoothed = (means.mean * means.number + 2) / (means.number + 4)
    note = "" if outside.any() else f"none of {len(phi):,} samples"
    return _average(means.mean, smoothed * (1 - smoothed) / means.number, note=note)


def pass_at_k_estimates(
    rewards: Tensor, names: Sequence[str], prompt_index: Tensor, num_prompts: int, ks: Sequence[int]
) -> dict[str, Estimate]:
    """pass@k, averaged over prompts, of each reward that is 0 or 1 wherever it is known.

    The names are `pass_at_<k>`, and `pass_at_<k>/<reward>` where there are several rewards; see
    [`~trl_bayes.evaluation.pass_at_k.pass_at_k`].

    Args:
        rewards: (N, K).
        names: of the K rewards.
        prompt_index: (N,) int64.
        num_prompts: P.
        ks: what to compute.
    """
    estimates = {}
    for k in ks:
        for column, name in enumerate(names):
            known = ~rewards[:, column].isnan()
            values, index = rewards[known, column], prompt_index[known]
            if not ((values == 0) | (values == 1)).all() or not len(values):
                continue
            number = torch.bincount(index, minlength=num_prompts)
            correct = torch.bincount(index, weights=values.double(), minlength=num_prompts)
            enough = bool((number >= k).all())
            note = "" if enough else f"fewer than {k} samples of some prompt"
            key = f"pass_at_{k}" + (f"/{name}" if len(names) > 1 else "")
            estimates[key] = _average(*pass_at_k(correct, number, k), enough, note)
    return estimates


def diversity_estimates(samples: Samples, max_order: int = 3) -> dict[str, Estimate]:
    """Distinct-1 to distinct-`max_order`, self-BLEU and the share of distinct completions, of all samples together.

    A sequence is a completion's tokens, without prompt and EOS. Compare only sets with the same number of samples of
    each prompt. Standard errors are the jackknife's.
    """

    def estimate(items: list, measure: Any) -> Estimate:
        value = measure(items)
        if math.isnan(value):
            return Estimate(math.nan, trusted=False, note="too few samples")
        return Estimate(value, jackknife_standard_error(items, measure))

    tokens = samples.tokens()
    orders = range(1, max_order + 1)
    return {
        **{f"distinct_{n}": estimate(tokens, lambda items, n=n: distinct_n(items, n)) for n in orders},
        "self_bleu": estimate(tokens, self_bleu),
        "share_distinct": estimate(samples.outcomes(), share_distinct),
    }


@dataclass(frozen=True)
class Scored:
    """Samples with all that is known of them: `log_policy` and `log_prior` (N,) in nats, `rewards` (N, K)."""

    samples: Samples
    log_policy: Tensor
    log_prior: Tensor
    rewards: Tensor

    def select(self, indices: Tensor) -> "Scored":
        """The samples with these indices (M,)."""
        return Scored(
            self.samples.select(indices), self.log_policy[indices], self.log_prior[indices], self.rewards[indices]
        )


@dataclass(frozen=True)
class PriorReference:
    """
    Samples of the prior, drawn and scored once for every target and every policy.

    Attributes:
        scored ([`Scored`]): the samples; their policy is the prior.
        reward_names (`list[str]`): of the columns of the rewards.
        settings (`dict`): temperature, max_new_tokens and seed with which they were drawn; `evaluate` uses the same.
        columns (`dict[str, list]`): further columns for the reward functions, an entry per prompt.
    """

    scored: Scored
    reward_names: list[str]
    settings: dict[str, Any]
    columns: dict[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def num_prompts(self) -> int:
        return len(self.scored.samples.prompts)


PosteriorMethod = Literal["rejection", "importance"]


@dataclass(frozen=True)
class Posterior:
    """
    The posterior of one target, as samples.

    Attributes:
        prior ([`PriorReference`]): the samples of the prior, without those that no reward function scored.
        target ([`~trl_bayes.targets.Target`]): what they are conditioned on.
        phi (`torch.Tensor`): (N,) their log-potential.
        partition ([`LogZPerPrompt`]): log Z of each prompt.
        exact ([`Scored`]): M exact samples of the posterior, by rejection. They are approximate where `method` is
            `"importance"`: rejection with the largest evidence that was seen.
        exact_phi (`torch.Tensor`): (M,) their log-potential.
        method (`str`): how averages over the posterior are taken: `"rejection"`, over `exact`, or `"importance"`, over
            the weighted samples of the prior.
        prompt_keys (`torch.Tensor`): (P,) by which the target knows the prompts.
        diversity_per_prompt (`torch.Tensor`): (P,) how many samples of each prompt every model's diversity is measured
            from, since it depends on the number.
        pass_at (`tuple[int, ...]`): k of each pass@k to measure.
        note (`str`): what to know about them.
        reward_weights (`torch.Tensor`, *optional*): (K,) of the sum that is reported as the reward.
    """

    prior: PriorReference
    target: Target
    phi: Tensor
    partition: LogZPerPrompt
    exact: Scored
    exact_phi: Tensor
    method: "PosteriorMethod"
    prompt_keys: Tensor
    diversity_per_prompt: Tensor
    pass_at: tuple[int, ...] = ()
    note: str = ""
    reward_weights: Tensor | None = None

    @property
    def points(self) -> Scored:
        """The samples at which a policy must be scored: the exact ones, or those of the prior that have a weight."""
        if self.method == "rejection":
            return self.exact
        return self.prior.scored.select(torch.nonzero(~self.phi.isneginf()).squeeze(1))

    def log_potential(self, scored: Scored) -> Tensor:
        """phi (N,) float64 of other completions of the same prompts."""
        return _log_potential(self.target, scored, self.prompt_keys)

    def weighted(self, at_points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, LogZPerPrompt]:
        """What the weighted estimates take, from `log pi` at the points (M,): prior, policy, phi, index, log Z."""
        log_policy = torch.full_like(self.phi, -torch.inf)
        log_policy[~self.phi.isneginf()] = at_points
        scored = self.prior.scored
        return scored.log_prior, log_policy, self.phi, scored.samples.prompt_index, self.partition


@dataclass
class Evaluation:
    """
    The estimates of one policy.

    Attributes:
        name (`str`): of the policy.
        metrics (`dict[str, Estimate]`): `reward`, the weighted sum (and `reward/<name>` where there are several, each
            without its weight), `kl_prior`, `forward_kl`, `reverse_kl`, `total_variation`, `entropy`, `log_z`; with a
            hard target `reverse_kl_inside` and `mass_outside`; `pass_at_<k>` (and `pass_at_<k>/<name>`) for rewards of
            0 and 1; and the diversity.
        num_samples (`int`): of the policy.
        num_posterior_samples, num_prior_samples (`int`): of the reference; those of the posterior are the prior's with
            any weight where averages are weighted.
        num_diversity_samples (`int`): of the policy, from which the diversity was measured.
        note (`str`): what to know about all of them.
    """

    name: str
    metrics: dict[str, Estimate]
    num_samples: int = 0
    num_posterior_samples: int = 0
    num_prior_samples: int = 0
    num_diversity_samples: int = 0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, see [`Estimate.to_dict`]."""
        return {**vars(self), "metrics": {name: value.to_dict() for name, value in self.metrics.items()}}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Evaluation":
        """What [`~Evaluation.to_dict`] wrote."""
        metrics = {name: Estimate.from_dict(value) for name, value in record["metrics"].items()}
        return cls(**{**record, "metrics": metrics})


def draw_prior(
    prior: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    reward_funcs: Sequence[RewardFunction],
    num_per_prompt: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    columns: Mapping[str, Sequence[Any]] | None = None,
    progress: bool = False,
    prior_name: str | None = None,
    prior_samples_dir: str | None = None,
) -> PriorReference:
    """
    Samples the prior and scores the samples; arguments and errors as [`~trl_bayes.language_models.samples.sample`].

    Args:
        reward_funcs (`list`): see [`~trl_bayes.language_models.samples.score`].
        columns (`dict`, *optional*): further columns for them, an entry per prompt.
        prior_name (`str`, *optional*): folder or id that the prior was loaded from. Defaults to what its config says.
        prior_samples_dir (`str`, *optional*): keeps the samples in a folder, and finds there what a training run or
            another evaluation has kept, see [`~trl_bayes.prior.sample_prior`].
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    model = PriorModel(prior, tokenizer, **settings, batch_size=batch_size, name=prior_name, progress=progress)
    further = dict(columns or {})
    drawn, log_prior, rewards = sample_prior(
        model, prompts, reward_funcs, num_per_prompt, columns=further, folder=prior_samples_dir
    )
    names = [getattr(function, "__name__", f"reward_{k}") for k, function in enumerate(reward_funcs)]
    return PriorReference(Scored(drawn, log_prior, log_prior, rewards), names, settings, further)


def _scoring(temperature: float, batch_size: int, progress: bool) -> dict[str, Any]:
    """Settings of `log_probs`: large batches make generation fast, but scoring slow, since they hold all logits."""
    return {"temperature": temperature, "batch_size": min(batch_size, 64), "progress": progress}


def condition(
    prior: PriorReference,
    target: Target,
    *,
    max_log_potential: float | None = None,
    reward_weights: Tensor | None = None,
    prompt_keys: Tensor | None = None,
    method: PosteriorMethod | None = None,
    max_per_prompt: int | None = None,
    diversity_per_prompt: int | None = None,
    pass_at: Sequence[int] = (),
    seed: int = 0,
) -> Posterior:
    """
    The prior's samples conditioned on the target's evidence: log Z, and exact samples of the posterior or weights.

    Args:
        prior ([`PriorReference`]): from [`draw_prior`].
        target ([`~trl_bayes.targets.Target`]): gives `phi`. One that learns from the prior and has not yet done so is
            fitted to these samples; the standard errors do not include the error of that fit, and the note says so.
        max_log_potential (`float`, *optional*): the largest `phi` that any completion could have, for instance the
            largest reward over beta. Defaults to the target's own bound, if it has one before it is fitted.
        reward_weights (`torch.Tensor`, *optional*): the trainer's, (K,).
        prompt_keys (`torch.Tensor`, *optional*): (P,) int64, by which a fitted target knows the prompts. Defaults to
            0, 1, ..., for a target that is fitted here or does not look at the prompt.
        method (`str`, *optional*): `"rejection"` takes averages over the posterior from exact samples, `"importance"`
            from weighted samples of the prior. Defaults to rejection where `max_log_potential` is known.
        max_per_prompt (`int`, *optional*): keeps at most so many exact samples for a prompt.
        diversity_per_prompt (`int`, *optional*): measures the diversity of every model from at most so many samples of
            each prompt: no more than a policy has in [`evaluate`]. Defaults to as many as the posterior has. Where the
            posterior has fewer than 30 for some prompt, its own row is marked and does not limit the others.
        pass_at (`list[int]`, *optional*): k of each pass@k to measure.
        seed (`int`, *optional*, defaults to `0`): of the rejection.

    Raises:
        ValueError: no sample was scored, the target reads a reward that is not there, the bound does not hold, or
            rejection is asked for without one.
    """
    target.bind(prior.reward_names, reward_weights)
    keys = torch.arange(prior.num_prompts) if prompt_keys is None else prompt_keys
    notes = []
    if max_log_potential is None:
        max_log_potential = target.max_log_potential()
    if not target.is_fitted:
        target.warn_of_too_few_samples(len(prior.scored.samples) // prior.num_prompts)
        shape = (prior.num_prompts, len(prior.scored.samples) // prior.num_prompts)  # as many samples of each prompt
        scored = prior.scored
        target.fit(PriorScores(scored.rewards.view(*shape, -1), scored.log_prior.view(shape), keys))
        notes.append("the target was fitted to the same samples of the prior, an error that is not included")
    phi = _log_potential(target, prior.scored, keys)  # (N,)
    if phi.isnan().any():
        notes.append(f"{int(phi.isnan().sum()):,} samples of the prior have no reward and are left out")
        prior = replace(prior, scored=prior.scored.select(torch.nonzero(~phi.isnan()).squeeze(1)))
        phi = phi[~phi.isnan()]
    if not phi.numel():
        raise ValueError("No sample of the prior has a reward: check the reward functions.")
    if method is None:
        method = "importance" if max_log_potential is None else "rejection"
    if method == "rejection" and max_log_potential is None:
        raise ValueError(
            f"Exact samples of {target!r} by rejection need evidence with a known upper bound: set "
            "`max_log_potential`, or use importance sampling."
        )
    index = prior.scored.samples.prompt_index
    partition = log_z_per_prompt(phi, index, prior.num_prompts, max_log_potential)
    if max_log_potential is None:
        max_log_potential = phi.max().item()
        notes.append(
            "the largest evidence is not known: the posterior's diversity is of rejection with the largest seen"
        )
    accepted = rejection(phi, max_log_potential, seed) if max_log_potential > -math.inf else torch.arange(0)
    if max_per_prompt is not None:
        accepted = accepted[_first_of_each_prompt(index[accepted], torch.full((prior.num_prompts,), max_per_prompt))]
    exact = prior.scored.select(accepted)
    per_prompt = torch.bincount(exact.samples.prompt_index, minlength=prior.num_prompts)  # (P,)
    if diversity_per_prompt is not None:
        few = per_prompt.min() < min(MIN_EFFECTIVE_SAMPLES, diversity_per_prompt)
        per_prompt = per_prompt.new_full((prior.num_prompts,), diversity_per_prompt) if few else per_prompt
        per_prompt = per_prompt.clamp(max=diversity_per_prompt)
    return Posterior(
        prior,
        target,
        phi,
        partition,
        exact,
        phi[accepted],
        method,
        keys,
        per_prompt,
        tuple(pass_at),
        _joint(*notes),
        reward_weights,
    )


def _log_potential(target: Target, scored: Scored, prompt_keys: Tensor) -> Tensor:
    """phi (N,) float64."""
    return target(scored.rewards, Context(scored.log_prior, prompt_keys[scored.samples.prompt_index])).double()


def _first_of_each_prompt(prompt_index: Tensor, limits: Tensor) -> Tensor:
    """Indices of the first `limits[p]` samples of each prompt p, in order."""
    order = prompt_index.argsort(stable=True)
    number = torch.bincount(prompt_index, minlength=len(limits))  # (P,)
    first = number.cumsum(dim=0) - number  # (P,) where each prompt begins in the sorted order
    rank = torch.empty_like(prompt_index)
    rank[order] = torch.arange(len(prompt_index)) - first[prompt_index[order]]
    return torch.nonzero(rank < limits[prompt_index]).squeeze(1)


def evaluate(
    policy: PreTrainedModel,
    prior: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward_funcs: Sequence[RewardFunction],
    posterior: Posterior,
    *,
    num_per_prompt: int,
    name: str = "policy",
    diversity: bool = True,
    batch_size: int = 256,
    seed: int = 1,
    progress: bool = False,
) -> tuple[Evaluation, Scored]:
    """
    Samples a policy and measures how far it is from the posterior.

    Args:
        policy, prior ([`~transformers.PreTrainedModel`]): with the same vocabulary.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of both.
        reward_funcs (`list`): those of the reference.
        posterior ([`Posterior`]): from [`condition`]; the prompts, temperature and length are its own.
        num_per_prompt (`int`): samples of the policy for each prompt.
        name (`str`, *optional*, defaults to `"policy"`): of the policy.
        diversity (`bool`, *optional*, defaults to `True`): whether to measure it too.
        batch_size (`int`, *optional*, defaults to `256`): of sampling; scoring takes at most 64 at once.
        seed (`int`, *optional*, defaults to `1`): of the policy's samples. Not the prior's seed, or a policy that is
            still the prior gives the prior's own samples, which are not independent of log Z.
        progress (`bool`, *optional*, defaults to `False`): shows progress bars.

    Returns:
        The [`Evaluation`], and the policy's samples ([`Scored`]).

    Raises:
        ValueError: another number of reward functions than the reference has.
    """
    if len(reward_funcs) != len(posterior.prior.reward_names):
        raise ValueError(
            f"There are {len(reward_funcs)} reward functions, the prior's samples were scored by "
            f"{posterior.prior.reward_names}: give the same."
        )
    settings = posterior.prior.settings
    scoring = _scoring(settings["temperature"], batch_size, progress)
    drawn = sample(
        policy,
        tokenizer,
        posterior.prior.scored.samples.prompts,
        num_per_prompt,
        max_new_tokens=settings["max_new_tokens"],
        temperature=settings["temperature"],
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    scored = Scored(
        drawn,
        log_policy=log_probs(policy, drawn, **scoring),
        log_prior=log_probs(prior, drawn, **scoring),
        rewards=score(reward_funcs, drawn, **posterior.prior.columns),
    )
    at_posterior = log_probs(policy, posterior.points.samples, **scoring)
    return measure(posterior, scored, at_posterior, name=name, diversity=diversity), scored


def measure(
    posterior: Posterior,
    scored: Scored,
    log_policy_at_posterior: Tensor,
    *,
    name: str = "policy",
    diversity: bool = True,
) -> Evaluation:
    """
    All estimates of a policy from scored samples, without any model.

    Args:
        posterior ([`Posterior`]): from [`condition`].
        scored ([`Scored`]): samples of the policy.
        log_policy_at_posterior (`torch.Tensor`): (M,) log pi at the posterior's `points`.
        name, diversity: as in [`evaluate`].
    """
    z, num_prompts = posterior.partition, posterior.prior.num_prompts
    phi = posterior.log_potential(scored)  # (N,)
    known = ~phi.isnan()
    index = scored.samples.prompt_index
    at_policy = (scored.log_policy[known], scored.log_prior[known], phi[known], index[known])
    metrics = {
        **_rewards(posterior, scored.rewards, index),
        "kl_prior": stratified_mean(scored.log_policy - scored.log_prior, index, num_prompts),
        **_distances_over_posterior(posterior, log_policy_at_posterior),
        "reverse_kl": reverse_kl(*at_policy, z),
        "entropy": stratified_mean(-scored.log_policy, index, num_prompts),
        "log_z": _average_log_z(z),
        **pass_at_k_estimates(scored.rewards, posterior.prior.reward_names, index, num_prompts, posterior.pass_at),
    }
    if posterior.target.hard:
        if math.isfinite(metrics["reverse_kl"].value):
            unseen = "no sample outside the posterior's support; infinite if there is any mass"
            metrics["reverse_kl"] = metrics["reverse_kl"]._replace(note=_joint(metrics["reverse_kl"].note, unseen))
        metrics["reverse_kl_inside"] = reverse_kl_inside(*at_policy, z)
        metrics["mass_outside"] = mass_outside(phi[known], index[known], num_prompts)
    unscored = int((~known).sum())
    return _evaluation(
        name,
        metrics,
        posterior,
        scored.samples,
        diversity,
        f"{unscored:,} samples have no reward and are left out where evidence counts" if unscored else "",
    )


def _distances_over_posterior(posterior: Posterior, at_points: Tensor) -> dict[str, Estimate]:
    """The distances that are averages over the posterior, from log pi at its points (M,)."""
    if posterior.method == "importance":
        weighted = posterior.weighted(at_points)
        return {
            "forward_kl": weighted_forward_kl(*weighted),
            "total_variation": weighted_total_variation(*weighted),
        }
    exact, z = posterior.exact, posterior.partition
    arguments = (exact.log_prior + posterior.exact_phi, at_points, exact.samples.prompt_index, z)
    return {"forward_kl": forward_kl(*arguments), "total_variation": total_variation(*arguments)}


def _evaluation(
    name: str, metrics: dict[str, Estimate], posterior: Posterior, samples: Samples, diversity: bool, note: str = ""
) -> Evaluation:
    """With the diversity of as many samples of each prompt as for every other model."""
    diverse = samples.select(_first_of_each_prompt(samples.prompt_index, posterior.diversity_per_prompt))
    varied = diversity_estimates(diverse) if diversity else {}
    return Evaluation(
        name,
        {**metrics, **varied},
        num_samples=len(samples),
        num_posterior_samples=len(posterior.points.samples),
        num_prior_samples=len(posterior.phi),
        num_diversity_samples=len(diverse) if diversity else 0,
        note=_joint(posterior.note, note),
    )


def evaluate_prior(posterior: Posterior, *, name: str = "prior", diversity: bool = True) -> Evaluation:
    """The prior itself as a policy, from the samples of the reference.

    Its samples gave log Z too, so only what does not need both to be independent is reported: not `reverse_kl`.
    """
    evaluation = measure(posterior, posterior.prior.scored, posterior.points.log_prior, name=name, diversity=diversity)
    for metric in ("reverse_kl", "reverse_kl_inside"):
        evaluation.metrics.pop(metric, None)
    return evaluation


def evaluate_posterior(posterior: Posterior, *, name: str = "posterior", diversity: bool = True) -> Evaluation:
    """The exact posterior's own row, from its exact samples.

        H(p) = -E_p[log pi_0 + phi] + log Z,      KL(p||pi_0) = E_p[phi] - log Z

    Standard errors as in [`forward_kl`]; the distances to itself are zero by definition.
    """
    itself = Estimate(0.0, 0.0, note="by definition")
    metrics = {
        **(_weighted_row(posterior) if posterior.method == "importance" else _exact_row(posterior)),
        "forward_kl": itself,
        "reverse_kl": itself,
        "total_variation": itself,
        "log_z": _average_log_z(posterior.partition),
    }
    if posterior.target.hard:
        metrics.update(reverse_kl_inside=itself, mass_outside=itself)
    evaluation = _evaluation(name, metrics, posterior, posterior.exact.samples, diversity)
    if evaluation.num_diversity_samples < posterior.diversity_per_prompt.sum():
        few = "the posterior has too few samples to compare its diversity"
        for key in evaluation.metrics.keys() - metrics.keys():
            evaluation.metrics[key] = evaluation.metrics[key]._replace(trusted=False, note=few)
    return evaluation


def _exact_row(posterior: Posterior) -> dict[str, Estimate]:
    """The posterior's rewards, divergence from the prior, entropy and pass@k, from its exact samples."""
    z, num_prompts, exact = posterior.partition, posterior.prior.num_prompts, posterior.exact
    names, index = posterior.prior.reward_names, exact.samples.prompt_index
    information = _minus_log_z(_means(exact.log_prior + posterior.exact_phi, index, num_prompts), z)
    return {
        **_rewards(posterior, exact.rewards, index),
        "kl_prior": _minus_log_z(_means(posterior.exact_phi, index, num_prompts), z),
        "entropy": information._replace(value=-information.value),
        **pass_at_k_estimates(exact.rewards, names, index, num_prompts, posterior.pass_at),
    }


def _weighted_row(posterior: Posterior) -> dict[str, Estimate]:
    """The same by importance sampling, but for pass@k, which has no unbiased estimate from weighted samples."""
    prior, phi, z = posterior.prior.scored, posterior.phi, posterior.partition
    index = prior.samples.prompt_index
    columns = _reward_columns(posterior.prior.reward_names, posterior.reward_weights, prior.rewards)

    def minus_log_z(values: Tensor) -> Estimate:
        return _weighted_average(_weighted_means(values, phi, index, z, -1.0), z, minus_log_z=True)

    information = minus_log_z(prior.log_prior + phi)
    return {
        **{name: _weighted_average(_weighted_means(column, phi, index, z), z) for name, column in columns.items()},
        "kl_prior": minus_log_z(phi),
        "entropy": information._replace(value=-information.value),
    }


def _rewards(posterior: Posterior, rewards: Tensor, prompt_index: Tensor) -> dict[str, Estimate]:
    """The mean of the sum of the rewards, and of each if there are several; without those that are missing."""
    return {
        name: stratified_mean(column[~column.isnan()], prompt_index[~column.isnan()], posterior.prior.num_prompts)
        for name, column in _reward_columns(posterior.prior.reward_names, posterior.reward_weights, rewards).items()
    }


def _reward_columns(names: Sequence[str], weights: Tensor | None, rewards: Tensor) -> dict[str, Tensor]:
    """The weighted sum of the rewards (N,), as trainers log it, and each if there are several; NaN where missing."""
    columns = {"reward": weighted_sum(rewards, weights)}
    if len(names) > 1:
        columns.update({f"reward/{name}": rewards[:, k] for k, name in enumerate(names)})
    return columns
