"""The work of an evaluation: samples of the prior and of policies in rounds, kept as they are drawn, and measured."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..evaluation.evaluate import Evaluation, measure, note_of_stops
from ..evaluation.posterior import Posterior, PosteriorMethod, condition
from ..evaluation.rounds import FIRST_ROUND, growth_needed, next_round
from ..language_models.completions import Completions
from ..language_models.scoring import LogProbs
from ..prior.drawing import PriorKeeper
from ..prior.log_probs import KeptLogProbs
from ..prior.reference import draw_prior
from ..prior.trained_on import draws_trained_on
from ..statistics.estimate import Estimate, join_notes
from .evaluation import KEPT, Job
from .models import load_model


_METHODS: dict[str, PosteriorMethod | None] = {"auto": None, "rejection": "rejection", "importance": "importance"}
_OF_POLICY = ("kl_prior", "reverse_kl", "reverse_kl_inside", "mass_outside")  # that more of its samples make better


class NoPosteriorError(ValueError):
    """Samples of the prior that allow no posterior: for the user to set right."""


class Sampled(NamedTuple):
    """A policy's samples, and what is needed of it to measure them without the model."""

    completions: Completions
    log_policy_at_posterior: torch.Tensor  # (M,)
    note: str


class Measurement(NamedTuple):
    """What has been found: the posterior, and each policy's estimates and samples."""

    posterior: Posterior
    policies: dict[str, tuple[Evaluation, Completions]]
    numbers: dict[str, int]  # of samples of each prompt, by the prior and by each policy


class Measuring:
    """
    Draws, scores and measures what a [`Job`] asks for, in rounds, until the standard errors are as was asked for.

    Samples and log-probabilities are kept in the output folder, so a round finds those of the one before, and a second
    start those of the first.

    Args:
        job ([`Job`]): what is asked for.
        say (`Callable[[str], None]`): shows a line.
    """

    def __init__(self, job: Job, say: Callable[[str], None]):
        self.job, self.say = job, say
        self.log_prior = self._kept_log_probs(job.study.prior, job.study.prior_path)
        self.trained_on = {draw for path in job.policies.values() for draw in draws_trained_on(path)}
        self.number = 0  # of the samples of the prior for each prompt

    def posterior(self) -> Posterior:
        """
        The posterior, from as many samples of the prior as log Z needs.

        Raises:
            PriorSamplesError: samples that were kept cannot be used.
            NoPosteriorError: the samples do not allow a posterior; one sentence.
        """
        most = self.job.args.num_reference_samples
        # The error of a fit is in no standard error, and depends on the number of samples
        self.number = self._first_round(most) if self.job.study.target.is_fitted else most
        while True:
            posterior = self._posterior()
            growth = self._growth({"log_z": posterior.z.average()}, "log_z")
            if growth == 1 or self.number == most:
                return posterior
            self.number = next_round(self.number, growth, most)

    def measure(self, posterior: Posterior) -> Measurement:
        """
        Every policy, each loaded for its turn only; with more samples of the prior where KL(p||pi) of one needs these.

        Args:
            posterior ([`~trl_bayes.evaluation.posterior.Posterior`]): from [`~Measuring.posterior`].
        """
        most = self.job.args.num_reference_samples
        while True:
            sampled = {name: self._sample(name, path, posterior) for name, path in self.job.policies.items()}
            numbers = {name: len(each.completions) // len(self.job.study.rows) for name, each in sampled.items()}
            # Diversity depends on the number of samples, so every model's is measured from as many
            posterior = posterior.with_diversity_of(min(numbers.values()))
            found = {name: self._measured(posterior, name, each) for name, each in sampled.items()}
            growth = max(self._growth(evaluation.metrics, "forward_kl") for evaluation in found.values())
            if growth == 1 or self.number == most:
                self._say_where_it_stopped(numbers)
                results = {name: (found[name], sampled[name].completions) for name in sampled}
                return Measurement(posterior, results, {"prior": self.number, **numbers})
            self.number = next_round(self.number, growth, most)
            posterior = self._posterior()

    # ---------------------------------------------------------------------------------------------------------------
    # The prior

    def _posterior(self) -> Posterior:
        args, study = self.job.args, self.job.study
        reference = draw_prior(
            study.prior,
            study.tokenizer,
            study.prompts,
            study.rewards,
            self.number,
            study.settings_of_prior,
            study.columns,
            folder=study.prior_samples_dir or self._kept / "samples",
            prior_name=study.prior_path,
            log_probs=self.log_prior,
            trained_on=self.trained_on,
        )
        try:
            return condition(
                reference,
                study.target,
                max_log_potential=self.job.max_log_potential,
                reward_weights=study.reward_weights,
                method=_METHODS[args.method],
                diversity_per_prompt=args.num_samples,
                pass_at=sorted(set(args.pass_at)),
                seed=args.seed,
            )
        except ValueError as error:
            raise NoPosteriorError(str(error)) from error

    # ---------------------------------------------------------------------------------------------------------------
    # Policies

    def _sample(self, name: str, path: str, posterior: Posterior) -> Sampled:
        """As many samples of a policy as its distances need, and its log-probability at those of the posterior."""
        study, args, settings = self.job.study, self.job.args, posterior.prior.settings
        policy = load_model(path, self.job.arguments.model, self.job.arguments.training, args.device)
        log_policy = self._kept_log_probs(policy, path)
        # Not the prior's seed, or a policy that is still the prior gives the prior's samples, which log Z has seen
        seed = args.seed + 1 if settings.seed != args.seed + 1 else args.seed + 2
        keeper = PriorKeeper(
            policy,
            study.tokenizer,
            study.prompts,
            study.rewards,
            replace(settings, seed=seed),
            study.columns,
            path,
            log_policy,
            f"samples of {name}",
        )
        at_posterior = log_policy(policy, posterior.points, settings)
        note, number = note_of_stops(policy, study.tokenizer, settings), self._first_round(args.num_samples)
        while True:
            drawn = keeper.collect(self._kept / "samples", number)
            log_prior = self.log_prior(study.prior, drawn, settings)
            completions = drawn.with_known(log_policy=drawn.log_prior, log_prior=log_prior)
            sampled = Sampled(completions, at_posterior, note)
            metrics = measure(posterior, completions, at_posterior, diversity=False).metrics
            growth = self._growth(metrics, *_OF_POLICY)
            if growth == 1 or number == args.num_samples:
                break
            number = next_round(number, growth, args.num_samples)
        del policy, log_policy, keeper
        gc.collect()
        return sampled

    def _measured(self, posterior: Posterior, name: str, sampled: Sampled) -> Evaluation:
        completions, at_posterior, note = sampled
        evaluation = measure(posterior, completions, at_posterior, name=name, diversity=self.job.args.diversity)
        return replace(evaluation, note=join_notes(evaluation.note, note))

    # ---------------------------------------------------------------------------------------------------------------
    # Rounds

    def _first_round(self, most: int) -> int:
        args = self.job.args
        return min(most, max(FIRST_ROUND, *args.pass_at, 0)) if args.standard_error > 0 else most

    def _growth(self, metrics: dict[str, Estimate], *names: str) -> float:
        return growth_needed(metrics, names, self.job.args.standard_error)

    def _say_where_it_stopped(self, numbers: dict[str, int]) -> None:
        args = self.job.args
        pairs = [("the prior", self.number, args.num_reference_samples)]
        pairs += [(name, number, args.num_samples) for name, number in numbers.items()]
        stopped = [f"{name} after {number:,} of {most:,}" for name, number, most in pairs if number < most]
        if stopped:
            how = f"{args.standard_error:g} nats, or {args.standard_error:.0%} of a larger number"
            self.say(
                f"Stopped drawing, of each prompt: {', '.join(stopped)}; the standard errors of log Z and of the "
                f"distances are at most {how}. `--standard_error 0` draws all."
            )

    # ---------------------------------------------------------------------------------------------------------------
    # What is kept

    @property
    def _kept(self) -> Path:
        return self.job.folder / KEPT

    def _kept_log_probs(self, model: PreTrainedModel, path: str) -> LogProbs:
        return KeptLogProbs(self._kept / "log_probs", model, path)
