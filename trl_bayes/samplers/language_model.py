"""Language models as the source of completions: generation, scoring and rewards for the sampling algorithms."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..language_models.completions import Completions, Prompt
from ..language_models.generation import evaluating, generate, seeded, tokenize_prompt, with_stop_ids
from ..language_models.samples import score
from ..language_models.scoring import log_probs
from ..language_models.settings import SamplingSettings
from ..rewards.calling import RewardFunction
from ..targets import Context, Target
from .source import CompletionSource, log_weights_of


class LanguageModelSource(CompletionSource):
    """
    Completions of a causal language model.

    Args:
        prior ([`~transformers.PreTrainedModel`]): pi_0.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the prior and the proposal.
        reward_funcs (`list`): see [`~trl_bayes.language_models.samples.score`].
        target ([`~trl_bayes.targets.Target`]): bound to these rewards.
        prompts (`list`): texts, or lists of messages.
        settings ([`~trl_bayes.language_models.settings.SamplingSettings`]): of both models.
        proposal ([`~transformers.PreTrainedModel`], *optional*): q. Defaults to the prior.
        columns (`dict`): further columns for the reward functions, an entry per prompt.
        prompt_keys (`torch.Tensor`): (P,) int64, by which the target knows the prompts.
    """

    def __init__(
        self,
        prior: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward_funcs: Sequence[RewardFunction],
        target: Target,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        *,
        proposal: PreTrainedModel | None,
        columns: Mapping[str, Sequence[Any]],
        prompt_keys: Tensor,
    ):
        self.prior, self.proposal, self.tokenizer = prior, proposal, tokenizer
        self.reward_funcs, self.target, self.columns = list(reward_funcs), target, dict(columns)
        self.prompts, self.prompt_keys = list(prompts), prompt_keys
        self.prompt_ids = [
            tokenize_prompt(tokenizer, prompt, settings.chat_template_kwargs) for prompt in self.prompts
        ]
        self.settings, self.max_new_tokens = with_stop_ids(settings, prior, tokenizer), settings.max_new_tokens
        self._seeds = numpy.random.default_rng(settings.seed)
        self._bar = tqdm(desc="generating", unit="completion", disable=not settings.progress)

    def extend(
        self,
        prompt_index: Tensor,
        prefixes: Sequence[list[int]],
        num_tokens: int | None = None,
        *,
        from_prior: bool = False,
    ) -> list[list[int]]:
        model = self.prior if from_prior or self.proposal is None else self.proposal
        most = self.max_new_tokens if num_tokens is None else num_tokens
        rooms = [min(most, self.max_new_tokens - len(prefix)) for prefix in prefixes]
        index = prompt_index.tolist()
        extended: list[list[int]] = [[] for _ in prefixes]
        order = sorted(range(len(rooms)), key=rooms.__getitem__)  # a batch generates as far as its longest
        with seeded(int(self._seeds.integers(2**62)), next(model.parameters()).device), evaluating(model):
            for start in range(0, len(order), self.settings.batch_size):
                batch = order[start : start + self.settings.batch_size]
                rows = [self.prompt_ids[index[i]] + prefixes[i] for i in batch]
                drawn = generate(model, rows, replace(self.settings, max_new_tokens=rooms[batch[-1]]))
                for i, row in zip(batch, drawn, strict=True):
                    new = row[: rooms[i]]
                    self.num_tokens += len(new)
                    extended[i] = prefixes[i] + new
                self.num_generated += len(batch)
                self._bar.update(len(batch))
        return extended

    def is_finished(self, completion_ids: list[int]) -> bool:
        return len(completion_ids) >= self.max_new_tokens or self._has_ended(completion_ids)

    def _has_ended(self, completion_ids: list[int]) -> bool:
        return bool(completion_ids) and completion_ids[-1] in self.settings.stop_ids

    def decode(self, completion_ids: list[list[int]]) -> list[str]:
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in completion_ids]

    def log_ratio(self, prompt_index: Tensor, completion_ids: list[list[int]]) -> Tensor:
        if self.proposal is None:
            return torch.zeros(len(completion_ids), dtype=torch.float64)
        completions = self._completions(prompt_index, completion_ids, [""] * len(completion_ids))
        return self._log_probs(self.prior, completions) - self._log_probs(self.proposal, completions)

    def evaluate(self, prompt_index: Tensor, completion_ids: list[list[int]]) -> Completions:
        completions = self._completions(prompt_index, completion_ids, self.decode(completion_ids))
        rewards = score(self.reward_funcs, completions, self.tokenizer, self.columns)
        completions = completions.with_known(rewards=rewards)
        log_ratio = torch.zeros(len(completions), dtype=torch.float64)
        log_prior = log_ratio
        if self.proposal is not None or self.target.needs_context:  # else nobody reads it
            log_prior = self._log_probs(self.prior, completions)
        if self.proposal is not None:
            log_ratio = log_prior - self._log_probs(self.proposal, completions)
        phi = self.target(completions.rewards, Context(log_prior, self.prompt_keys[prompt_index])).double()
        return completions.with_known(phi=phi, log_weights=log_weights_of(phi, log_ratio))

    def _log_probs(self, model: PreTrainedModel, completions: Completions) -> Tensor:
        return log_probs(model, completions, replace(self.settings, progress=False))  # the bar is that of generation

    def _completions(self, prompt_index: Tensor, completion_ids: list[list[int]], texts: list[str]) -> Completions:
        ended = torch.tensor([self._has_ended(ids) for ids in completion_ids], dtype=torch.bool)
        return Completions(self.prompts, self.prompt_ids, prompt_index, completion_ids, texts, ended)
