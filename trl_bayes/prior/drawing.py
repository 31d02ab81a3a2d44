"""Samples of the prior as evaluation and samplers draw them: by a language model, without a trainer."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..language_models.fingerprint import model_fingerprint
from ..language_models.generation import evaluating, find_stop_ids, generate, tokenize_prompt
from ..language_models.samples import Prompt, RewardFunction, Samples, log_probs, sample, score
from .callable_identity import callable_fingerprint
from .identity import DrawIdentity, prompt_key, row_key
from .samples import Draw, PriorSamples, Work
from .store import Completions, PriorSamplesError


MOVED = 0.02
"""Nats per token from the prior: more than rounding, much less than another model."""

_MOST_SCORED_AT_ONCE = 64  # large batches make generation fast, but scoring slow, since they hold all logits


class ScoredSamples(NamedTuple):
    """Samples of the prior `(N,)`, in the order of the prompts, as many of each."""

    samples: Samples
    log_prior: torch.Tensor
    """`log pi_0`, `(N,)` float64, in nats."""
    rewards: torch.Tensor
    """`(N, K)` float64."""


@dataclass(frozen=True)
class PriorModel:
    """
    A prior as a language model, and how it is sampled.

    Args:
        model ([`~transformers.PreTrainedModel`]): pi_0.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its own.
        max_new_tokens (`int`): a completion without a stop token is cut after so many tokens.
        temperature (`float`, *optional*, defaults to `1.0`): of the softmax.
        batch_size (`int`, *optional*, defaults to `256`): completions generated at once.
        seed (`int`, *optional*, defaults to `0`): of the samples.
        name (`str`, *optional*): folder or id that the model was loaded from. Defaults to what its configuration says,
            which of an adapter is the base model.
        progress (`bool`, *optional*, defaults to `False`): shows progress bars.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 256
    seed: int = 0
    name: str | None = None
    progress: bool = False

    def identity(self) -> DrawIdentity:
        """
        Of what this draws.

        Raises:
            PriorSamplesError: the model's weights are not all here.
        """
        name = self.name or self.model.config._name_or_path
        weights = model_fingerprint(name, self.model)
        if weights is None:
            raise PriorSamplesError(
                f"The weights of {name!r} are spread over several processes, so its samples cannot be told from those "
                "of another model: load it whole, or leave `prior_samples_dir` unset."
            )
        stop_ids = find_stop_ids(self.model, self.tokenizer)
        return DrawIdentity(name, weights, self.temperature, self.max_new_tokens, stop_ids, self.seed)

    def log_probs(self, samples: Samples) -> torch.Tensor:
        """`log pi_0` of samples, `(N,)` float64."""
        batch_size = min(self.batch_size, _MOST_SCORED_AT_ONCE)
        return log_probs(
            self.model, samples, temperature=self.temperature, batch_size=batch_size, progress=self.progress
        )


def sample_prior(
    prior: PriorModel,
    prompts: Sequence[Prompt],
    reward_funcs: Sequence[RewardFunction],
    num_per_prompt: int,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> ScoredSamples:
    """
    Samples of the prior for each prompt, scored; kept in a folder and found there, if one is given.

    What a training run has kept in its `prior_samples_dir` is found if it is of the same model, prompts, temperature,
    length, stop tokens and seed; what is missing is drawn and added, for the next training too. Kept completions are
    scored under this model again, in its own precision.

    Args:
        prior ([`PriorModel`]): what is sampled, and how.
        prompts (`list`): texts, or lists of messages.
        reward_funcs (`list`): see [`~trl_bayes.language_models.samples.score`].
        num_per_prompt (`int`): at least 1; with a folder at least 2.
        columns (`dict`, *optional*): further columns for the reward functions, an entry per prompt.
        folder (`str` or `Path`, *optional*): see [`PriorSamples`].

    Returns:
        [`ScoredSamples`]

    Raises:
        ValueError: as [`~trl_bayes.language_models.samples.sample`].
        PriorSamplesError: samples in the folder cannot be used, or are not of this model.
    """
    further = dict(columns or {})
    if folder is None:
        drawn = sample(
            prior.model,
            prior.tokenizer,
            prompts,
            num_per_prompt,
            max_new_tokens=prior.max_new_tokens,
            temperature=prior.temperature,
            batch_size=prior.batch_size,
            seed=prior.seed,
            progress=prior.progress,
        )
        return ScoredSamples(drawn, prior.log_probs(drawn), score(reward_funcs, drawn, **further))
    return _Kept(prior, list(prompts), reward_funcs, further).collect(folder, num_per_prompt)


class _Kept:
    """Draws and scores for the folder, by places of prompts."""

    def __init__(
        self,
        prior: PriorModel,
        prompts: list[Prompt],
        reward_funcs: Sequence[RewardFunction],
        columns: Mapping[str, Sequence[Any]],
    ):
        self.prior, self.prompts, self.reward_funcs, self.columns = prior, prompts, reward_funcs, columns
        self.prompt_ids = [tokenize_prompt(prior.tokenizer, prompt) for prompt in prompts]
        self.stop_ids = find_stop_ids(prior.model, prior.tokenizer)

    def collect(self, folder: str | os.PathLike[str], num_per_prompt: int) -> ScoredSamples:
        rows = [
            {"prompt": prompt, **{name: values[i] for name, values in self.columns.items()}}
            for i, prompt in enumerate(self.prompts)
        ]
        kept = PriorSamples(
            folder,
            self.prior.identity(),
            torch.tensor([prompt_key(ids) for ids in self.prompt_ids], dtype=torch.int64),
            torch.tensor([row_key(row) for row in rows], dtype=torch.int64),
            rewards=[callable_fingerprint(function) for function in self.reward_funcs],
            num_samples=num_per_prompt,
            chunk_size=self.prior.batch_size,
        )
        missing = kept.missing()
        kept.collect(self._draw, self._score, range(len(self.prompts)), Work(progress=self.prior.progress))
        places = torch.arange(len(self.prompts))
        completions, scores = kept.completions(), kept.scores(places, dtype=torch.float64)
        samples = self._samples(places.repeat_interleave(num_per_prompt), completions)
        found = torch.ones(len(samples), dtype=torch.bool)
        found[missing] = False
        log_prior = completions.log_prior
        if found.any():
            log_prior = log_prior.clone()
            log_prior[found] = self.prior.log_probs(samples.select(torch.nonzero(found).squeeze(1)))
            self._refuse_another_model(kept, completions, log_prior)
        return ScoredSamples(samples, log_prior, scores.rewards.flatten(0, 1))

    def _draw(self, places: list[int], seed: int) -> Draw:
        prior = self.prior
        with evaluating(prior.model):
            ids = generate(
                prior.model,
                [self.prompt_ids[place] for place in places],
                max_new_tokens=prior.max_new_tokens,
                temperature=prior.temperature,
                stop_ids=self.stop_ids,
                pad_token_id=prior.tokenizer.pad_token_id,
            )
        texts = [str(prior.tokenizer.decode(each, skip_special_tokens=True)) for each in ids]
        nothing = torch.zeros(0)
        samples = self._samples(torch.tensor(places), Completions(ids, texts, [], nothing))
        messages = [None if isinstance(given, str) else given for given in samples.completions()]
        log_prior = log_probs(
            prior.model, samples, temperature=prior.temperature, batch_size=min(prior.batch_size, _MOST_SCORED_AT_ONCE)
        )
        return Draw(Completions(ids, texts, messages, log_prior), score(self.reward_funcs, samples, **self.columns))

    def _score(self, places: list[int], kept: Completions) -> torch.Tensor:
        return score(self.reward_funcs, self._samples(torch.tensor(places), kept), **self.columns)

    def _samples(self, prompt_index: torch.Tensor, completions: Completions) -> Samples:
        ids = [list(each) for each in completions.completion_ids]
        ended = torch.tensor([each[-1] in self.stop_ids for each in ids], dtype=torch.bool)
        return Samples(self.prompts, self.prompt_ids, prompt_index, ids, list(completions.texts), ended)

    def _refuse_another_model(self, kept: PriorSamples, completions: Completions, log_prior: torch.Tensor) -> None:
        """By how likely these completions are to whoever drew them and to this model, per token."""
        tokens = sum(len(ids) for ids in completions.completion_ids)
        distance = (completions.log_prior - log_prior).sum().item() / tokens
        if not distance <= MOVED:
            raise PriorSamplesError(
                f"The prior samples in {kept.folder} are {distance:.2g} nats per token more likely to the model that "
                "drew them than to this one, so they are not of this prior: delete them, or use another folder."
            )
