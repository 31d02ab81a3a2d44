"""The posterior of one target as samples: those of the prior, conditioned on the evidence.

The prior is sampled once ([`~trl_bayes.prior.reference.draw_prior`]). Where the evidence is bounded, samples of the
prior become exact samples of the posterior by rejection; otherwise they are weighted, `w = exp(phi) / Z`. Both serve
for every policy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy
import torch
from torch import Tensor

from ..language_models.completions import Completions
from ..prior.reference import PriorReference
from ..statistics.estimate import MIN_EFFECTIVE_SAMPLES, join_notes
from ..statistics.log_z import LogZPerPrompt, check_log_weights, log_z_per_prompt
from ..targets import Context, Target
from .distances import PolicySamples, PosteriorSamples


PosteriorMethod = Literal["rejection", "importance"]


@dataclass(frozen=True)
class Posterior:
    """
    The posterior of one target, as samples.

    Attributes:
        prior ([`~trl_bayes.prior.reference.PriorReference`]): N samples of the prior with their `phi`, without those
            that no reward function scored.
        target ([`~trl_bayes.targets.Target`]): what they are conditioned on.
        z ([`~trl_bayes.statistics.log_z.LogZPerPrompt`]): log Z of each prompt.
        accepted (`torch.Tensor`): (M,) which of the N samples are exact ones of the posterior, by rejection.
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
    z: LogZPerPrompt
    accepted: Tensor
    method: PosteriorMethod
    prompt_keys: Tensor
    diversity_per_prompt: Tensor
    pass_at: tuple[int, ...] = ()
    note: str = ""
    reward_weights: Tensor | None = None

    @property
    def phi(self) -> Tensor:
        """Log-potential (N,) of the samples of the prior."""
        return self.prior.completions.phi

    @cached_property
    def exact(self) -> Completions:
        """
        The M exact samples of the posterior.

        They are approximate where `method` is `"importance"`: of rejection with the largest evidence that was seen.
        """
        return self.prior.completions.select(self.accepted)

    @cached_property
    def points(self) -> Completions:
        """The samples at which a policy must be scored: the exact ones, or those of the prior that have a weight."""
        return self.prior.completions.select(self._places())

    def _places(self) -> Tensor:
        return self.accepted if self.method == "rejection" else torch.nonzero(~self.phi.isneginf()).squeeze(1)

    def log_potential(self, completions: Completions) -> Tensor:
        """phi (N,) float64 of other completions of the same prompts."""
        return _log_potential(self.target, completions, self.prompt_keys)

    def with_diversity_of(self, most: int) -> "Posterior":
        """The same, whose diversity is measured from at most so many samples of each prompt, see [`condition`]."""
        return replace(self, diversity_per_prompt=_diversity_per_prompt(self.exact, most))

    def samples(self, log_policy: Tensor) -> PosteriorSamples:
        """The samples of the prior as those of the posterior, with `log pi` (M,) at its [`~Posterior.points`]."""
        drawn, places = self.prior.completions, self._places()
        weights = (drawn.phi - self.z.log_z[drawn.prompt_index]).exp()
        log_ratio, shares = torch.zeros_like(weights), weights
        log_ratio[places] = log_policy - self._log_posterior(drawn.log_prior, drawn.phi, drawn.prompt_index)[places]
        if self.method == "rejection":
            shares = torch.zeros_like(weights)
            shares[places] = 1.0
        return PosteriorSamples(log_ratio, shares, weights, drawn.prompt_index)

    def policy_samples(self, completions: Completions) -> PolicySamples:
        """Samples of a policy with their log-ratio to the posterior; `phi` is known, and not NaN."""
        index = completions.prompt_index
        log_posterior = self._log_posterior(completions.log_prior, completions.phi, index)
        return PolicySamples(completions.log_policy - log_posterior, index)

    def _log_posterior(self, log_prior: Tensor, phi: Tensor, prompt_index: Tensor) -> Tensor:
        return log_prior + phi - self.z.log_z[prompt_index]


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
        prior ([`~trl_bayes.prior.reference.PriorReference`]): from [`~trl_bayes.prior.reference.draw_prior`].
        target ([`~trl_bayes.targets.Target`]): gives `phi`. One that learns from the prior and has not yet done so is
            fitted to these samples; the standard errors do not include the error of that fit, and the note says so.
        max_log_potential (`float`, *optional*): the largest `phi` that any completion could have, for instance the
            largest reward over beta. Defaults to the target's own bound, if it has one.
        reward_weights (`torch.Tensor`, *optional*): the trainer's, (K,).
        prompt_keys (`torch.Tensor`, *optional*): (P,) int64, by which a fitted target knows the prompts. Defaults to
            0, 1, ..., for a target that is fitted here or does not look at the prompt.
        method (`str`, *optional*): `"rejection"` takes averages over the posterior from exact samples, `"importance"`
            from weighted samples of the prior. Defaults to rejection where `max_log_potential` is known.
        max_per_prompt (`int`, *optional*): keeps at most so many exact samples for a prompt.
        diversity_per_prompt (`int`, *optional*): measures the diversity of every model from at most so many samples of
            each prompt: no more than a policy has in [`~trl_bayes.evaluation.evaluate.evaluate`]. Defaults to as many
            as the posterior has. Where the posterior has fewer than 30 for some prompt, its own row is marked and does
            not limit the others.
        pass_at (`list[int]`, *optional*): k of each pass@k to measure.
        seed (`int`, *optional*, defaults to `0`): of the rejection.

    Raises:
        ValueError: no sample was scored, the target reads a reward that is not there, the bound does not hold, or
            rejection is asked for without one.
    """
    target.bind(prior.reward_names, reward_weights)
    keys = torch.arange(prior.num_prompts) if prompt_keys is None else prompt_keys
    prior, notes = _with_log_potential(prior, target, keys)
    drawn = prior.completions
    if max_log_potential is None:
        max_log_potential = target.max_log_potential()  # one that learns may know it only now
    method = _check_method(method, target, max_log_potential)
    z = log_z_per_prompt(drawn.phi, drawn.prompt_index, prior.num_prompts, max_log_potential)
    if max_log_potential is None:
        max_log_potential = drawn.phi.max().item()
        notes.append(
            "the largest evidence is not known: the posterior's diversity is of rejection with the largest seen"
        )
    accepted = rejection(drawn.phi, max_log_potential, seed) if max_log_potential > -math.inf else torch.arange(0)
    if max_per_prompt is not None:
        limits = torch.full((prior.num_prompts,), max_per_prompt)
        accepted = accepted[drawn.select(accepted).indices_of_first(limits)]
    return Posterior(
        prior,
        target,
        z,
        accepted,
        method,
        keys,
        _diversity_per_prompt(drawn.select(accepted), diversity_per_prompt),
        tuple(pass_at),
        join_notes(*notes),
        reward_weights,
    )


def _check_method(method: PosteriorMethod | None, target: Target, max_log_potential: float | None) -> PosteriorMethod:
    """The method, by default rejection where it is possible."""
    if method is None:
        return "importance" if max_log_potential is None else "rejection"
    if method == "rejection" and max_log_potential is None:
        raise ValueError(
            f"Exact samples of {target!r} by rejection need evidence with a known upper bound: set "
            "`max_log_potential`, or use importance sampling."
        )
    return method


def _with_log_potential(prior: PriorReference, target: Target, keys: Tensor) -> tuple[PriorReference, list[str]]:
    """The samples that have a log-potential, with it, and notes; a target that learns has then been fitted."""
    notes = []
    if not target.is_fitted:
        target.warn_of_too_few_samples(len(prior.completions) // prior.num_prompts)
        target.fit(prior.scores(keys))
        notes.append("the target was fitted to the same samples of the prior, an error that is not included")
    drawn = prior.completions.with_known(phi=_log_potential(target, prior.completions, keys))
    unscored = drawn.phi.isnan()
    if unscored.all():
        raise ValueError("No sample of the prior has a reward: check the reward functions.")
    if unscored.any():
        notes.append(f"{int(unscored.sum()):,} samples of the prior have no reward and are left out")
        drawn = drawn.select(torch.nonzero(~unscored).squeeze(1))
    return replace(prior, completions=drawn), notes


def _log_potential(target: Target, completions: Completions, prompt_keys: Tensor) -> Tensor:
    """phi (N,) float64."""
    return target(completions.rewards, Context(completions.log_prior, prompt_keys[completions.prompt_index])).double()


def _diversity_per_prompt(exact: Completions, most: int | None) -> Tensor:
    """(P,) how many samples of each prompt diversity is measured from: as many as there are exact ones, or `most`."""
    number = exact.number_per_prompt()
    if most is None:
        return number
    few = number.min() < min(MIN_EFFECTIVE_SAMPLES, most)
    return number.new_full((len(number),), most) if few else number.clamp(max=most)


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
    check_log_weights(phi, max_log_potential)
    # Not torch's generator: the samples may have been drawn with the same seed, and the decisions would follow them
    uniform = torch.from_numpy(numpy.random.default_rng(seed).random(len(phi)))
    return torch.nonzero(uniform < (phi - max_log_potential).exp()).squeeze(1)
