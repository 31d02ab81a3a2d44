"""Samples of the prior that are kept in a folder, as evaluation and samplers draw them, without a trainer."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..language_models.completions import Completions, Prompt
from ..language_models.fingerprint import model_fingerprint
from ..language_models.generation import evaluating, generate, tokenize_prompt
from ..language_models.parsing import as_rewards_see_them
from ..language_models.samples import score
from ..language_models.scoring import LogProbs, log_probs
from ..language_models.settings import SamplingSettings
from ..rewards.calling import RewardFunction
from .callable_identity import callable_fingerprint
from .identity import DrawIdentity, prompt_key, row_key
from .samples import Draw, PriorSamples, Work
from .store import KeptCompletions, PriorSamplesError
from .trained_on import draws_trained_on


_TO_ANOTHER_SEED = 1_000_003  # far from those that people choose
MOVED = 0.02
"""Nats per token from the prior: more than rounding, much less than another model."""


@dataclass(frozen=True)
class PriorKeeper:
    """
    Draws and scores samples of the prior, or of any other model, for a folder, and finds there what was kept before.

    What a training run has kept in its `prior_samples_dir` is found if it is of the same model, prompts, temperature,
    length, stop tokens and seed; what is missing is drawn and added, for the next training too. Kept completions are
    scored under this model again, in its own precision. Those on which a policy was trained (`prior_fraction`, XPO)
    say nothing of how near it is to others: who measures policies names their draws, and gets samples of another seed.

    Args:
        model ([`~transformers.PreTrainedModel`]): pi_0.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its own.
        prompts (`list`): texts, or lists of messages.
        reward_funcs (`list`): see [`~trl_bayes.language_models.samples.score`].
        settings ([`~trl_bayes.language_models.settings.SamplingSettings`]): with the prior's stop tokens.
        columns (`Mapping`): further columns for the reward functions, an entry per prompt.
        name (`str`, *optional*): folder or id that the model was loaded from. Defaults to what its configuration says,
            which of an adapter is the base model.
        log_probs (`Callable`, *optional*): scores completions under the model, as
            [`~trl_bayes.language_models.scoring.log_probs`] does, which is the default.
        what (`str`, *optional*, defaults to `"prior samples"`): what is drawn, as the progress bar has it.
        trained_on (`Collection[str]`, *optional*):
            Draws that are not to be used, see [`~trl_bayes.prior.trained_on.draws_trained_on`], besides those that are
            marked in the folder. By default any is used.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    reward_funcs: Sequence[RewardFunction]
    settings: SamplingSettings
    columns: Mapping[str, Sequence[Any]]
    name: str | None = None
    log_probs: LogProbs = log_probs
    what: str = "prior samples"
    trained_on: Collection[str] | None = None

    def collect(self, folder: str | os.PathLike[str], num_per_prompt: int) -> Completions:
        """
        Samples in the order of the prompts, as many of each, with `log_prior` and `rewards`.

        Raises:
            ValueError: a prompt without tokens, or fewer than 2 samples of each.
            PriorSamplesError: samples in the folder cannot be used, or are not of this model.
        """
        rows = [
            {"prompt": prompt, **{name: values[i] for name, values in self.columns.items()}}
            for i, prompt in enumerate(self.prompts)
        ]
        keys = [
            torch.tensor([prompt_key(ids) for ids in self._prompt_ids], dtype=torch.int64),
            torch.tensor([row_key(row) for row in rows], dtype=torch.int64),
        ]
        kept = self._untrained(folder, keys, num_per_prompt)
        missing = kept.missing()
        work = Work(progress=self.settings.progress, what=self.what)
        kept.collect(self._draw, self._score, range(len(self.prompts)), work)
        places = torch.arange(len(self.prompts))
        found, scores = kept.completions(), kept.scores(places, dtype=torch.float64)
        completions = self._completions(places.repeat_interleave(num_per_prompt), found)
        log_prior = self._in_own_precision(kept, completions, found.log_prior, missing)
        return completions.with_known(log_prior=log_prior, rewards=scores.rewards.flatten(0, 1))

    def _untrained(
        self, folder: str | os.PathLike[str], keys: Sequence[torch.Tensor], num_per_prompt: int
    ) -> PriorSamples:
        """What is kept by the seed of the settings, or by the first one after it whose draw may be used."""
        identity = self._identity()
        rewards = [callable_fingerprint(function) for function in self.reward_funcs]
        while True:
            kept = PriorSamples(
                folder,
                identity,
                *keys,
                rewards=rewards,
                num_samples=num_per_prompt,
                chunk_size=self.settings.batch_size,
            )
            draw = identity.fingerprint
            if self.trained_on is None or draw not in {*self.trained_on, *draws_trained_on(kept.folder)}:
                return kept
            identity = replace(identity, seed=identity.seed + _TO_ANOTHER_SEED)

    def _identity(self) -> DrawIdentity:
        name = self.name or self.model.config._name_or_path
        weights = model_fingerprint(name, self.model)
        if weights is None:
            raise PriorSamplesError(
                f"The weights of {name!r} are spread over several processes, so its samples cannot be told from those "
                "of another model: load it whole, or leave `prior_samples_dir` unset."
            )
        settings = self.settings
        return DrawIdentity(
            name, weights, settings.temperature, settings.max_new_tokens, settings.stop_ids, settings.seed
        )

    @cached_property
    def _prompt_ids(self) -> list[list[int]]:
        template = self.settings.chat_template_kwargs
        return [tokenize_prompt(self.tokenizer, prompt, template) for prompt in self.prompts]

    def _draw(self, places: list[int], seed: int) -> Draw:
        prompts, prompt_ids = [self.prompts[i] for i in places], [self._prompt_ids[i] for i in places]
        with evaluating(self.model):
            ids = generate(self.model, prompt_ids, self.settings)
        texts = [str(self.tokenizer.decode(each, skip_special_tokens=True)) for each in ids]
        given = as_rewards_see_them(self.tokenizer, prompts, prompt_ids, ids)
        messages = [None if isinstance(each, str) else each for each in given]
        drawn = self._completions(torch.tensor(places), KeptCompletions(ids, texts, messages, torch.zeros(0)))
        log_prior = self.log_probs(self.model, drawn, replace(self.settings, progress=False))  # the draw has a bar
        rewards = score(self.reward_funcs, drawn, self.tokenizer, self.columns)
        return Draw(KeptCompletions(ids, texts, messages, log_prior), rewards)

    def _score(self, places: list[int], kept: KeptCompletions) -> torch.Tensor:
        return score(self.reward_funcs, self._completions(torch.tensor(places), kept), self.tokenizer, self.columns)

    def _completions(self, prompt_index: torch.Tensor, kept: KeptCompletions) -> Completions:
        ids = [list(each) for each in kept.completion_ids]
        ended = torch.tensor([each[-1] in self.settings.stop_ids for each in ids], dtype=torch.bool)
        return Completions(list(self.prompts), self._prompt_ids, prompt_index, ids, list(kept.texts), ended)

    def _in_own_precision(
        self, kept: PriorSamples, completions: Completions, log_prior: torch.Tensor, drawn_now: torch.Tensor
    ) -> torch.Tensor:
        """
        `log pi_0` by this model, `(N,)`, also of what another run has drawn.

        By how likely these completions are to whoever drew them and to this model, per token, another model is told.
        """
        found = torch.ones(len(completions), dtype=torch.bool)
        found[drawn_now] = False
        if not found.any():
            return log_prior
        earlier = completions.select(torch.nonzero(found).squeeze(1))
        own = log_prior.clone()
        own[found] = self.log_probs(self.model, earlier, self.settings)
        tokens = sum(len(ids) for ids in earlier.completion_ids)
        distance = (log_prior - own).sum().item() / tokens
        if not distance <= MOVED:
            raise PriorSamplesError(
                f"The prior samples in {kept.folder} are {distance:.2g} nats per token more likely to the model that "
                "drew them than to this one, so they are not of this prior: delete them, or use another folder."
            )
        return own
