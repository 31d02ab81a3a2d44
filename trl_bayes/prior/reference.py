"""Samples of the prior with their rewards: drawn and scored once, for every target, sampler and policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..language_models.completions import Completions, Prompt
from ..language_models.generation import with_stop_ids
from ..language_models.samples import sample, score
from ..language_models.scoring import log_probs
from ..language_models.settings import SamplingSettings
from ..rewards.calling import RewardFunction, reward_names
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
) -> PriorReference:
    """
    Samples the prior and scores the samples.

    Arguments and errors are those of [`~trl_bayes.language_models.samples.sample`], and:

    Args:
        reward_funcs (`list`): see [`~trl_bayes.language_models.samples.score`].
        columns (`dict`, *optional*): further columns for them, an entry per prompt.
    """
    names = reward_names(reward_funcs)
    settings = with_stop_ids(settings, prior, tokenizer)
    drawn = sample(prior, tokenizer, prompts, num_per_prompt, settings)
    log_prior = log_probs(prior, drawn, settings)
    further = dict(columns or {})
    rewards = score(reward_funcs, drawn, tokenizer, further)
    completions = drawn.with_known(log_policy=log_prior, log_prior=log_prior, rewards=rewards)
    return PriorReference(completions, names, settings, further)
