"""Samples of the prior with their rewards: drawn and scored once, for every target, sampler and policy."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..language_models.completions import Completions, Prompt
from ..language_models.generation import with_stop_ids
from ..language_models.samples import sample, score
from ..language_models.scoring import LogProbs, log_probs
from ..language_models.settings import SamplingSettings
from ..rewards.calling import RewardFunction, reward_names
from .drawing import PriorKeeper
from .scores import PriorScores


@dataclass(frozen=True)
class PriorReference:
    """
    Samples of the prior, with all that is known of them.

    Attributes:
        completions ([`~trl_bayes.language_models.completions.Completions`]):
            The samples, as many of each prompt. `log_prior` and `rewards` are known, and `log_policy`: their policy is
            the prior.
        reward_names (`list[str]`): of the columns of the rewards.
        settings ([`~trl_bayes.language_models.settings.SamplingSettings`]):
            With which they were drawn, the prior's stop tokens among them; who compares other models with them uses
            the same.
        columns (`dict[str, list]`): further columns for the reward functions, an entry per prompt.
    """

    completions: Completions
    reward_names: list[str]
    settings: SamplingSettings
    columns: dict[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def num_prompts(self) -> int:
        """P."""
        return len(self.completions.prompts)

    def scores(self, prompt_keys: Tensor) -> PriorScores:
        """
        What targets learn from: rewards (P, N, K) and `log pi_0` (P, N).

        Args:
            prompt_keys (`torch.Tensor`): (P,) int64, by which the target will know the prompts.
        """
        shape = (self.num_prompts, len(self.completions) // self.num_prompts)
        rewards, log_prior = self.completions.rewards, self.completions.log_prior
        return PriorScores(rewards.view(*shape, -1), log_prior.view(shape), prompt_keys)


def draw_prior(
    prior: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    reward_funcs: Sequence[RewardFunction],
    num_per_prompt: int,
    settings: SamplingSettings,
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    prior_name: str | None = None,
    log_probs: LogProbs = log_probs,
    trained_on: Collection[str] | None = None,
) -> PriorReference:
    """
    Samples the prior and scores the samples; keeps them in a folder and finds them there, if one is given.

    Arguments and errors are those of [`~trl_bayes.language_models.samples.sample`], and:

    Args:
        reward_funcs (`list`): see [`~trl_bayes.language_models.samples.score`].
        columns (`dict`, *optional*): further columns for them, an entry per prompt.
        folder (`str` or `Path`, *optional*): a training's `prior_samples_dir`, or any other; see
            [`~trl_bayes.prior.drawing.PriorKeeper`].
        prior_name (`str`, *optional*): folder or id that the prior was loaded from, by which samples are found.
        log_probs (`Callable`, *optional*): scores completions, see [`~trl_bayes.prior.drawing.PriorKeeper`].
        trained_on (`Collection[str]`, *optional*): draws of the folder that are not to be used, see there.

    Raises:
        PriorSamplesError: samples in the folder cannot be used, or are not of this model.
    """
    names = reward_names(reward_funcs)
    settings = with_stop_ids(settings, prior, tokenizer)
    further = dict(columns or {})
    if folder is not None:
        keeper = PriorKeeper(
            prior,
            tokenizer,
            list(prompts),
            reward_funcs,
            settings,
            further,
            prior_name,
            log_probs,
            trained_on=trained_on,
        )
        completions = keeper.collect(folder, num_per_prompt)
    else:
        drawn = sample(prior, tokenizer, prompts, num_per_prompt, settings)
        rewards = score(reward_funcs, drawn, tokenizer, further)
        completions = drawn.with_known(log_prior=log_probs(prior, drawn, settings), rewards=rewards)
    completions = completions.with_known(log_policy=completions.log_prior)
    return PriorReference(completions, names, settings, further)
