"""Language models as the source of completions: generation, scoring and rewards for the sampling algorithms."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..language_models.generation import evaluating, find_stop_ids, generate, seeded, tokenize_prompt
from ..language_models.samples import Prompt, Samples, log_probs, score
from ..rewards.calling import RewardFunction
from ..targets import Context, Target
from .source import Candidates, CompletionSource, SamplingError


_MOST_SCORED_AT_ONCE = 64  # large batches make generation fast, but scoring slow, since it holds all logits


class LanguageModelSource(CompletionSource):
    """
    Completions of a causal language model.

    Args:
        prior ([`~transformers.PreTrainedModel`]): pi_0.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the prior and the proposal.
        reward_funcs (`list`): see [`~trl_bayes.language_models.samples.score`].
        target ([`~trl_bayes.targets.Target`]): bound to these rewards.
        prompts (`list`): texts, or lists of messages.
        proposal ([`~transformers.PreTrainedModel`], *optional*): q. Defaults to the prior.
        max_new_tokens (`int`): T, at which a completion is cut.
        temperature (`float`): of the softmax, of both models.
        batch_size (`int`): completions generated at once.
        seed (`int`): of what is drawn.
        columns (`dict`): further columns for the reward functions, an entry per prompt.
        prompt_keys (`torch.Tensor`): (P,) int64, by which the target knows the prompts.
        progress (`bool`): shows a progress bar.
    """

    def __init__(
        self,
        prior: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward_funcs: Sequence[RewardFunction],
        target: Target,
        prompts: Sequence[Prompt],
        *,
        proposal: PreTrainedModel | None,
        max_new_tokens: int,
        temperature: float,
        batch_size: int,
        seed: int,
        columns: Mapping[str, Sequence[Any]],
        prompt_keys: Tensor,
        progress: bool,
    ):
        self.prior, self.proposal, self.tokenizer = prior, proposal, tokenizer
        self.reward_funcs, self.target, self.columns = list(reward_funcs), target, dict(columns)
        self.prompts, self.prompt_keys = list(prompts), prompt_keys
        self.prompt_ids = [tokenize_prompt(tokenizer, prompt) for prompt in self.prompts]
        self.max_new_tokens, self.temperature, self.batch_size = max_new_tokens, temperature, batch_size
        self.stop_ids = find_stop_ids(prior, tokenizer)
        self._seeds = numpy.random.default_rng(seed)
        self._bar = tqdm(desc="generating", unit="completion", disable=not progress)

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
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                drawn = generate(
                    model,
                    [self.prompt_ids[index[i]] + prefixes[i] for i in batch],
                    max_new_tokens=rooms[batch[-1]],
                    temperature=self.temperature,
                    stop_ids=self.stop_ids,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
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
        return bool(completion_ids) and completion_ids[-1] in self.stop_ids

    def decode(self, completion_ids: list[list[int]]) -> list[str]:
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in completion_ids]

    def log_ratio(self, prompt_index: Tensor, completion_ids: list[list[int]]) -> Tensor:
        if self.proposal is None:
            return torch.zeros(len(completion_ids), dtype=torch.float64)
        samples = self._samples(prompt_index, completion_ids, [""] * len(completion_ids))
        return self._log_probs(self.prior, samples) - self._log_probs(self.proposal, samples)

    def evaluate(self, prompt_index: Tensor, completion_ids: list[list[int]]) -> Candidates:
        samples = self._samples(prompt_index, completion_ids, self.decode(completion_ids))
        rewards = score(self.reward_funcs, samples, self.tokenizer, self.columns)
        log_ratio = torch.zeros(len(samples), dtype=torch.float64)
        log_prior = log_ratio
        if self.proposal is not None or self.target.needs_context:  # else nobody reads it
            log_prior = self._log_probs(self.prior, samples)
        if self.proposal is not None:
            log_ratio = log_prior - self._log_probs(self.proposal, samples)
        phi = self.target(rewards, Context(log_prior, self.prompt_keys[prompt_index])).double()
        if phi.isposinf().any():
            raise SamplingError(f"The target {self.target!r} gives infinite log-potential: it must be below +inf.")
        return Candidates(prompt_index, completion_ids, samples.texts, samples.ended, log_ratio, rewards, phi)

    def _log_probs(self, model: PreTrainedModel, samples: Samples) -> Tensor:
        batch_size = min(self.batch_size, _MOST_SCORED_AT_ONCE)
        return log_probs(model, samples, temperature=self.temperature, batch_size=batch_size)

    def _samples(self, prompt_index: Tensor, completion_ids: list[list[int]], texts: list[str]) -> Samples:
        ended = torch.tensor([self._has_ended(ids) for ids in completion_ids], dtype=torch.bool)
        return Samples(self.prompts, self.prompt_ids, prompt_index, completion_ids, texts, ended)
