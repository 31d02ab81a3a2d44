"""Samples of a language model, and their rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..rewards.calling import RewardFunction, call_rewards
from .completions import Completions, Prompt
from .generation import evaluating, generate, seeded, tokenize_prompt, with_stop_ids
from .parsing import as_rewards_see_them
from .progress import progress_bar
from .settings import SamplingSettings, at_least


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    num_per_prompt: int,
    settings: SamplingSettings,
) -> Completions:
    """
    Draws completions from the model's exact distribution: plain ancestral sampling, whatever its generation config.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model; its mode and settings stay as they are.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's.
        prompts (`list`): texts, or lists of messages to which the chat template is applied.
        num_per_prompt (`int`): completions of each prompt. They are in the order of the prompts.
        settings ([`SamplingSettings`]): the same ones give the same samples. The caller's random state is left as it
            was.

    Raises:
        ValueError: no prompts, a prompt without tokens, or fewer than one completion of each.
    """
    if not prompts:
        raise ValueError("There are no prompts to sample from: give at least one.")
    at_least("num_per_prompt", num_per_prompt)
    prompts = list(prompts)
    prompt_ids = [tokenize_prompt(tokenizer, prompt, settings.chat_template_kwargs) for prompt in prompts]
    prompt_index = torch.arange(len(prompts)).repeat_interleave(num_per_prompt)  # (N,)
    settings = with_stop_ids(settings, model, tokenizer)
    completion_ids: list[list[int]] = []
    starts = range(0, len(prompt_index), settings.batch_size)
    device = next(model.parameters()).device
    bar = progress_bar("sampling", len(prompt_index), shown=settings.progress)
    with bar, seeded(settings.seed, device), evaluating(model):
        for start in starts:
            batch = prompt_index[start : start + settings.batch_size].tolist()
            completion_ids += generate(model, [prompt_ids[i] for i in batch], settings)
            bar.update(len(batch))
    return Completions(
        prompts=prompts,
        prompt_ids=prompt_ids,
        prompt_index=prompt_index,
        completion_ids=completion_ids,
        texts=[str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completion_ids],
        ended=torch.tensor([ids[-1] in settings.stop_ids for ids in completion_ids]),
    )


def score(
    reward_funcs: Sequence[RewardFunction],
    samples: Completions,
    tokenizer: PreTrainedTokenizerBase,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> Tensor:
    """
    Rewards of the samples, by functions as TRL's trainers call them ([`~trl_bayes.rewards.calling.call_rewards`]).

    Args:
        reward_funcs (`list`): K functions, sync or async, of `prompts`, `completions`, `completion_ids`, the columns
            and what TRL adds.
        samples ([`Completions`]): what to score.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): makes texts or messages of the tokens.
        columns (`dict`, *optional*): further columns of the dataset, with one entry per prompt.

    Returns:
        `torch.Tensor`: (N, K) float64, rounded to single precision as in training; NaN where a function returned
            `None` or NaN. Infinite ones, which some are in single precision only, are for
            [`~trl_bayes.rewards.calling.without_infinite`].

    Raises:
        ValueError: a column without an entry for each prompt, or a function that returns another number of rewards.
    """
    for name, column in (columns or {}).items():
        if len(column) != len(samples.prompts):
            raise ValueError(f"The column {name!r} has {len(column)} entries for {len(samples.prompts)} prompts.")
    index = samples.prompt_index.tolist()
    prompts = [samples.prompts[i] for i in index]
    prompt_ids = [samples.prompt_ids[i] for i in index]
    rewards = call_rewards(
        reward_funcs,
        prompts,
        as_rewards_see_them(tokenizer, prompts, prompt_ids, samples.completion_ids),
        samples.completion_ids,
        {name: [column[i] for i in index] for name, column in (columns or {}).items()},
    ).float()
    return rewards.double()
