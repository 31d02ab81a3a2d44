"""How far a policy is from a posterior, estimated from samples, each number with its standard error.

All distances are in nats per sequence, and each is estimated for each prompt and then averaged over the prompts. The
estimates are pure functions ([`trl_bayes.evaluation.distances`]), checked against exact enumeration in
`tests/evaluation/`; what cannot be trusted is marked so (`Estimate.trusted`), with the reason in `note`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..language_models.completions import Completions
from ..language_models.generation import model_stop_ids
from ..language_models.samples import sample, score
from ..language_models.scoring import log_probs
from ..language_models.settings import SamplingSettings
from ..rewards.calling import RewardFunction
from ..statistics.estimate import Estimate, average, join_notes, stratified_mean
from ..targets.base import weighted_sum
from .distances import (
    forward_kl,
    mass_outside,
    posterior_means,
    reverse_kl,
    reverse_kl_inside,
    total_variation,
    trust_in_posterior,
)
from .diversity import diversity_estimates
from .pass_at_k import pass_at_k_estimates
from .posterior import Posterior


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
        """Strict JSON, see [`~trl_bayes.statistics.estimate.Estimate.to_dict`]."""
        return {**vars(self), "metrics": {name: value.to_dict() for name, value in self.metrics.items()}}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Evaluation":
        """What [`~Evaluation.to_dict`] wrote."""
        metrics = {name: Estimate.from_dict(value) for name, value in record["metrics"].items()}
        return cls(**{**record, "metrics": metrics})


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
    seed: int = 1,
) -> tuple[Evaluation, Completions]:
    """
    Samples a policy and measures how far it is from the posterior.

    Args:
        policy, prior ([`~transformers.PreTrainedModel`]): with the same vocabulary.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of both.
        reward_funcs (`list`): those of the reference.
        posterior ([`Posterior`]): from [`~trl_bayes.evaluation.posterior.condition`]. The policy is sampled with the
            prompts and settings of its prior, but for the seed: at its temperature and with its stop tokens, whatever
            the policy's own are. A note says so where they differ.
        num_per_prompt (`int`): samples of the policy for each prompt.
        name (`str`, *optional*, defaults to `"policy"`): of the policy.
        diversity (`bool`, *optional*, defaults to `True`): whether to measure it too.
        seed (`int`, *optional*, defaults to `1`): of the policy's samples. Not the prior's seed, or a policy that is
            still the prior gives the prior's own samples, which are not independent of log Z.

    Returns:
        The [`Evaluation`], and the policy's samples.

    Raises:
        ValueError: another number of reward functions than the reference has.
    """
    if len(reward_funcs) != len(posterior.prior.reward_names):
        raise ValueError(
            f"There are {len(reward_funcs)} reward functions, the prior's samples were scored by "
            f"{posterior.prior.reward_names}: give the same."
        )
    settings = replace(posterior.prior.settings, seed=seed)
    drawn = sample(policy, tokenizer, posterior.prior.completions.prompts, num_per_prompt, settings)
    completions = drawn.with_known(
        log_policy=log_probs(policy, drawn, settings),
        log_prior=log_probs(prior, drawn, settings),
        rewards=score(reward_funcs, drawn, tokenizer, posterior.prior.columns),
    )
    at_posterior = log_probs(policy, posterior.points, settings)
    evaluation = measure(posterior, completions, at_posterior, name=name, diversity=diversity)
    evaluation.note = join_notes(evaluation.note, note_of_stops(policy, tokenizer, settings))
    return evaluation, completions


def note_of_stops(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: SamplingSettings) -> str:
    """What to know of a policy that was sampled with the prior's stop tokens, where its own are others."""
    same = {*model_stop_ids(policy), tokenizer.eos_token_id} - {None} == {*settings.stop_ids}
    return "" if same else "it would stop at other tokens by itself, and was sampled with the prior's"


def measure(
    posterior: Posterior,
    completions: Completions,
    log_policy_at_posterior: Tensor,
    *,
    name: str = "policy",
    diversity: bool = True,
) -> Evaluation:
    """
    All estimates of a policy from scored samples, without any model.

    Args:
        posterior ([`Posterior`]): from [`~trl_bayes.evaluation.posterior.condition`].
        completions ([`~trl_bayes.language_models.completions.Completions`]): samples of the policy, with `log_policy`,
            `log_prior` and `rewards`, independent of those of the prior.
        log_policy_at_posterior (`torch.Tensor`): (M,) log pi at the posterior's `points`.
        name, diversity: as in [`evaluate`].
    """
    completions, note = _with_log_potential(posterior, completions)
    z, num_prompts = posterior.z, posterior.prior.num_prompts
    known = completions.select(torch.nonzero(~completions.phi.isnan()).squeeze(1))
    samples, policy = posterior.samples(log_policy_at_posterior), posterior.policy_samples(known)
    metrics = {
        **_of_samples(posterior, completions),
        "forward_kl": forward_kl(samples, z, policy),
        "total_variation": total_variation(samples, z, policy),
        "reverse_kl": reverse_kl(policy, z, samples),
        "log_z": z.average(),
    }
    if posterior.target.hard:
        if math.isfinite(metrics["reverse_kl"].value):
            unseen = "no sample outside the posterior's support; infinite if there is any mass"
            metrics["reverse_kl"] = metrics["reverse_kl"]._replace(note=join_notes(metrics["reverse_kl"].note, unseen))
        metrics["reverse_kl_inside"] = reverse_kl_inside(policy, z, samples)
        metrics["mass_outside"] = mass_outside(known.phi, known.prompt_index, num_prompts)
    return _evaluation(name, metrics, posterior, completions, diversity, note)


def _with_log_potential(posterior: Posterior, completions: Completions) -> tuple[Completions, str]:
    """The completions with phi, and a note where some have no reward."""
    phi = posterior.log_potential(completions)
    unscored = int(phi.isnan().sum())
    note = f"{unscored:,} samples have no reward and are left out where evidence counts" if unscored else ""
    return completions.with_known(phi=phi), note


def _of_samples(posterior: Posterior, completions: Completions) -> dict[str, Estimate]:
    """What a policy's samples alone tell: rewards, pass@k, divergence from the prior and entropy."""
    index, num_prompts = completions.prompt_index, posterior.prior.num_prompts
    names = posterior.prior.reward_names
    return {
        **_rewards(posterior, completions.rewards, index),
        "kl_prior": stratified_mean(completions.log_policy - completions.log_prior, index, num_prompts),
        "entropy": stratified_mean(-completions.log_policy, index, num_prompts),
        **pass_at_k_estimates(completions.rewards, names, index, num_prompts, posterior.pass_at),
    }


def _evaluation(
    name: str,
    metrics: dict[str, Estimate],
    posterior: Posterior,
    completions: Completions,
    diversity: bool,
    note: str = "",
) -> Evaluation:
    """With the diversity of as many samples of each prompt as for every other model."""
    diverse = completions.first_of_each_prompt(posterior.diversity_per_prompt)
    varied = diversity_estimates(diverse) if diversity else {}
    return Evaluation(
        name,
        {**metrics, **varied},
        num_samples=len(completions),
        num_posterior_samples=len(posterior.points),
        num_prior_samples=len(posterior.phi),
        num_diversity_samples=len(diverse) if diversity else 0,
        note=join_notes(posterior.note, note),
    )


def evaluate_prior(posterior: Posterior, *, diversity: bool = True) -> Evaluation:
    """The prior itself as a policy, from the samples of the reference.

    Its samples gave log Z too, so only what does not need both to be independent is reported: not `reverse_kl`.
    """
    completions, note = _with_log_potential(posterior, posterior.prior.completions)
    samples, z = posterior.samples(posterior.points.log_prior), posterior.z
    metrics = {
        **_of_samples(posterior, completions),
        "forward_kl": forward_kl(samples, z),
        "total_variation": total_variation(samples, z),
        "log_z": z.average(),
    }
    if posterior.target.hard:
        metrics["mass_outside"] = mass_outside(completions.phi, completions.prompt_index, posterior.prior.num_prompts)
    return _evaluation("prior", metrics, posterior, completions, diversity, note)


def evaluate_posterior(posterior: Posterior, *, diversity: bool = True) -> Evaluation:
    """The exact posterior's own row, from its exact samples.

        H(p) = -E_p[log pi_0 + phi] + log Z,      KL(p||pi_0) = E_p[phi] - log Z

    The distances to itself are zero by definition.
    """
    itself = Estimate(0.0, 0.0, note="by definition")
    metrics = {
        **_posterior_row(posterior),
        "forward_kl": itself,
        "reverse_kl": itself,
        "total_variation": itself,
        "log_z": posterior.z.average(),
    }
    if posterior.target.hard:
        metrics.update(reverse_kl_inside=itself, mass_outside=itself)
    evaluation = _evaluation("posterior", metrics, posterior, posterior.exact, diversity)
    if evaluation.num_diversity_samples < posterior.diversity_per_prompt.sum():
        few = "the posterior has too few samples to compare its diversity"
        for key in evaluation.metrics.keys() - metrics.keys():
            evaluation.metrics[key] = evaluation.metrics[key]._replace(trusted=False, note=few)
    return evaluation


def _posterior_row(posterior: Posterior) -> dict[str, Estimate]:
    """The posterior's rewards, divergence from the prior and entropy, and pass@k from its exact samples.

    pass@k has no unbiased estimate from weighted samples.
    """
    drawn, z, num_prompts = posterior.prior.completions, posterior.z, posterior.prior.num_prompts
    samples = posterior.samples(posterior.points.log_prior)
    trusted, note = trust_in_posterior(samples, z)

    def minus_log_z(values: Tensor) -> Estimate:
        means = posterior_means(values, samples, num_prompts, log_z_coefficient=-1.0)
        return average(means.mean - z.log_z, means.variance, trusted, note)

    information = minus_log_z(drawn.log_prior + drawn.phi)
    row = {"kl_prior": minus_log_z(drawn.phi), "entropy": information._replace(value=-information.value)}
    if posterior.method == "importance":
        columns = _reward_columns(posterior.prior.reward_names, posterior.reward_weights, drawn.rewards)
        for name, column in columns.items():
            means = posterior_means(column, samples, num_prompts)
            row[name] = average(means.mean, means.variance, trusted, note)
        return row
    exact, names = posterior.exact, posterior.prior.reward_names
    return {
        **_rewards(posterior, exact.rewards, exact.prompt_index),
        **row,
        **pass_at_k_estimates(exact.rewards, names, exact.prompt_index, num_prompts, posterior.pass_at),
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
