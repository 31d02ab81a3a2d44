"""Samples of a language model with their exact log-probabilities: what every evaluation starts from.

`log pi(y|x)` is the sum over the completion's tokens at the sampling temperature, the terminal EOS included. A
completion that is cut at the limit is an outcome of its own, so that the probabilities of all outcomes sum to one.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .generation import evaluating, find_stop_ids, generate, pad_rows, seeded, tokenize_prompt


Prompt = str | list[dict[str, Any]]
RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class Samples:
    """
    Completions of some prompts.

    Attributes:
        prompts (`list`): the P prompts, texts or lists of messages.
        prompt_ids (`list[list[int]]`): their tokens.
        prompt_index (`torch.Tensor`): (N,) int64, which prompt a completion continues.
        completion_ids (`list[list[int]]`): N lists of tokens, the terminal EOS included.
        texts (`list[str]`): the N completions as text, without special tokens.
        ended (`torch.Tensor`): (N,) bool, False for a completion that was cut at the limit.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    prompt_index: Tensor
    completion_ids: list[list[int]]
    texts: list[str]
    ended: Tensor

    def __len__(self) -> int:
        return len(self.completion_ids)

    def select(self, indices: Tensor) -> "Samples":
        """The completions with these indices (M,), of the same prompts."""
        chosen = indices.tolist()
        return replace(
            self,
            prompt_index=self.prompt_index[indices],
            completion_ids=[self.completion_ids[i] for i in chosen],
            texts=[self.texts[i] for i in chosen],
            ended=self.ended[indices],
        )

    def tokens(self) -> list[list[int]]:
        """Each completion's tokens without the terminal EOS, as the measures of diversity read them."""
        return [
            ids[:-1] if ended else ids for ids, ended in zip(self.completion_ids, self.ended.tolist(), strict=True)
        ]

    def completions(self) -> list[Any]:
        """What reward functions are given: texts, or a list with the assistant's message for a prompt of messages."""
        prompts = [self.prompts[i] for i in self.prompt_index.tolist()]
        return [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, self.texts, strict=True)
        ]

    def outcomes(self) -> list[tuple[int, tuple[int, ...]]]:
        """Each completion with its prompt as one hashable: two are equal if they are the same outcome."""
        pairs = zip(self.prompt_index.tolist(), self.completion_ids, strict=True)
        return [(index, tuple(ids)) for index, ids in pairs]


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    num_per_prompt: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Samples:
    """
    Draws completions from the model's exact distribution: plain ancestral sampling, whatever its generation config.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model; its mode and settings stay as they are.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's.
        prompts (`list`): texts, or lists of messages to which the chat template is applied.
        num_per_prompt (`int`): completions of each prompt. They are in the order of the prompts.
        max_new_tokens (`int`): a completion without EOS is cut after so many tokens.
        temperature (`float`, *optional*, defaults to `1.0`): of the softmax.
        batch_size (`int`, *optional*, defaults to `256`): completions generated at once.
        seed (`int`, *optional*, defaults to `0`): the same seed and batch size give the same samples. The caller's
            random state is left as it was.
        progress (`bool`, *optional*, defaults to `False`): shows a progress bar.

    Returns:
        [`Samples`]

    Raises:
        ValueError: no prompts, a prompt without tokens, or a number that is not positive.
    """
    if not prompts:
        raise ValueError("There are no prompts to sample from: give at least one.")
    numbers = {"num_per_prompt": num_per_prompt, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    prompts = list(prompts)
    prompt_ids = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    prompt_index = torch.arange(len(prompts)).repeat_interleave(num_per_prompt)  # (N,)
    stop_ids = find_stop_ids(model, tokenizer)
    completion_ids: list[list[int]] = []
    starts = range(0, len(prompt_index), batch_size)
    with seeded(seed, next(model.parameters()).device), evaluating(model):
        for start in tqdm(starts, desc="sampling", unit="batch", disable=not progress):
            completion_ids += generate(
                model,
                [prompt_ids[i] for i in prompt_index[start : start + batch_size].tolist()],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_ids=stop_ids,
                pad_token_id=tokenizer.pad_token_id,
            )
    return Samples(
        prompts=prompts,
        prompt_ids=prompt_ids,
        prompt_index=prompt_index,
        completion_ids=completion_ids,
        texts=[str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completion_ids],
        ended=torch.tensor([ids[-1] in stop_ids for ids in completion_ids]),
    )


@torch.no_grad()
def log_probs(
    model: PreTrainedModel,
    samples: Samples,
    *,
    temperature: float = 1.0,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """
    Log-probability of each completion: `sum_t log softmax(logits_t / temperature)[y_t]`.

    An outcome that occurs several times is scored once, so a collapsed policy is cheap. Sequences are sorted by their
    length and padded on the right, where a causal model cannot see it.

    Args:
        model ([`~transformers.PreTrainedModel`]): any causal language model with the same vocabulary.
        samples ([`Samples`]): what to score.
        temperature (`float`, *optional*, defaults to `1.0`): the sampling temperature.
        batch_size (`int`, *optional*, defaults to `64`): sequences in a forward pass.
        progress (`bool`, *optional*, defaults to `False`): shows a progress bar.

    Returns:
        `torch.Tensor`: (N,) float64 on CPU, in nats.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    device = next(model.parameters()).device
    outcomes = samples.outcomes()
    different = list(dict.fromkeys(outcomes))
    different.sort(key=lambda outcome: len(samples.prompt_ids[outcome[0]]) + len(outcome[1]))
    value_of: dict[tuple[int, tuple[int, ...]], float] = {}
    with evaluating(model):
        for start in tqdm(range(0, len(different), batch_size), desc="scoring", unit="batch", disable=not progress):
            batch = different[start : start + batch_size]
            values = _batch_log_probs(
                model, [samples.prompt_ids[i] for i, _ in batch], [list(ids) for _, ids in batch], temperature, device
            )
            value_of.update(zip(batch, values.tolist(), strict=True))
    return torch.tensor([value_of[outcome] for outcome in outcomes], dtype=torch.float64)


def score(reward_funcs: Sequence[RewardFunction], samples: Samples, **columns: Sequence[Any]) -> Tensor:
    """
    Rewards of the samples, by functions as TRL's trainers call them, each called once.

    Args:
        reward_funcs (`list`): functions, sync or async, of `prompts`, `completions`, `completion_ids` and the columns.
            For a prompt of messages, the completion is a list with the assistant's message.
        samples ([`Samples`]): what to score.
        columns: further columns of the dataset, with one entry per prompt.

    Returns:
        `torch.Tensor`: (N, K) float64, rounded to single precision as in training; NaN where a function returned
            `None`, NaN or, as in training, infinity.

    Raises:
        ValueError: a column without an entry for each prompt, or a function that returns another number of rewards.
    """
    for name, column in columns.items():
        if len(column) != len(samples.prompts):
            raise ValueError(f"The column {name!r} has {len(column)} entries for {len(samples.prompts)} prompts.")
    index = samples.prompt_index.tolist()
    prompts, completions = [samples.prompts[i] for i in index], samples.completions()
    further = {name: [column[i] for i in index] for name, column in columns.items()}
    rewards = torch.full((len(samples), len(reward_funcs)), torch.nan, dtype=torch.float64)
    for k, function in enumerate(reward_funcs):
        values = function(prompts=prompts, completions=completions, completion_ids=samples.completion_ids, **further)
        if inspect.isawaitable(values):
            values = asyncio.run(_wait_for(values))
        values = [math.nan if value is None or math.isinf(value) else float(value) for value in values]
        if len(values) != len(samples):
            name = getattr(function, "__name__", repr(function))
            raise ValueError(f"The reward function {name} returned {len(values)} rewards for {len(samples)} samples.")
        rewards[:, k] = torch.tensor(values, dtype=torch.float32)
    return rewards.masked_fill(rewards.isinf(), math.nan)  # too large for single precision


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable


def _batch_log_probs(
    model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[int]],
    temperature: float,
    device: torch.device,
) -> Tensor:
    """(B,) float64 on CPU."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    ids, mask = pad_rows(
        rows, pad_token_id=0, left=False
    )  # the padding's token does not matter: nothing that counts sees it
    starts = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)  # (B, 1)
    positions = torch.arange(1, ids.size(1)).unsqueeze(0)  # (1, L-1) of the tokens that are predicted
    own = ((positions >= starts) & mask[:, 1:].bool()).to(device)  # (B, L-1)
    ids, mask = ids.to(device), mask.to(device)
    logits = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1]).logits.float() / temperature  # (B, L-1, V)
    chosen = logits.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    per_token = (chosen - logits.logsumexp(dim=2)).double()  # (B, L-1)
    return torch.where(own, per_token, 0.0).sum(dim=1).cpu()
