"""Samples of a language model with their exact log-probabilities: what every evaluation starts from.

`log pi(y|x)` is the sum over the completion's tokens at the sampling temperature, the terminal EOS included. A
completion that is cut at the limit is an outcome of its own, so that the probabilities of all outcomes sum to one.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


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
    prompt_ids = [_tokenize(tokenizer, prompt) for prompt in prompts]
    prompt_index = torch.arange(len(prompts)).repeat_interleave(num_per_prompt)  # (N,)
    stop_ids = _stop_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=pad_id,
    )
    completion_ids: list[list[int]] = []
    device = next(model.parameters()).device
    starts = range(0, len(prompt_index), batch_size)
    with torch.no_grad(), _seeded(seed, device), _evaluating(model), _plain_generation(model):
        for start in tqdm(starts, desc="sampling", unit="batch", disable=not progress):
            batch = [prompt_ids[i] for i in prompt_index[start : start + batch_size].tolist()]
            ids, mask = (t.to(device) for t in _pad(batch, pad_id, left=True))
            generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
            completion_ids += [_cut_at_stop(row, stop_ids) for row in generated[:, ids.size(1) :].tolist()]
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
    with _evaluating(model):
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
        `torch.Tensor`: (N, K) float64; NaN where a function returned `None`, NaN or, as in training, infinity.

    Raises:
        ValueError: a column without an entry for each prompt, or a function that returns another number of rewards.
    """
    for name, column in columns.items():
        if len(column) != len(samples.prompts):
            raise ValueError(f"The column {name!r} has {len(column)} entries for {len(samples.prompts)} prompts.")
    index = samples.prompt_index.tolist()
    prompts = [samples.prompts[i] for i in index]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, samples.texts, strict=True)
    ]
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
        rewards[:, k] = torch.tensor(values, dtype=torch.float64)
    return rewards


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """As TRL tokenizes a prompt."""
    if isinstance(prompt, str):
        encoded: Any = tokenizer(text=prompt)
    else:
        encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = list(encoded["input_ids"])
    if not ids:
        raise ValueError(
            f"The prompt {prompt!r} has no tokens, so the first token of a completion would have no distribution: "
            "use a tokenizer that adds a first token, or leave this prompt out."
        )
    return ids


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's and the model's, as in TRL."""
    config: Any = model.generation_config
    ends = config.eos_token_id if config is not None else None
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    own = tokenizer.eos_token_id
    stop_ids = ends if own is None or own in ends else [own, *ends]
    if not stop_ids:
        raise ValueError("Neither the tokenizer nor the model has an EOS token: set `tokenizer.eos_token`.")
    return stop_ids


def _cut_at_stop(row: list[int], stop_ids: list[int]) -> list[int]:
    """A row as generated, up to and with its first stop token; what follows is padding."""
    return row[: next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))]


def _pad(rows: list[list[int]], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows padded to the longest: ids and mask, (B, L)."""
    length = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        padding, zeros = [pad_id] * (length - len(row)), [0] * (length - len(row))
        ids.append(padding + row if left else row + padding)
        mask.append(zeros + [1] * len(row) if left else [1] * len(row) + zeros)
    return torch.tensor(ids), torch.tensor(mask)


def _batch_log_probs(
    model: PreTrainedModel,
    prompts: list[list[int]],
    completions: list[list[int]],
    temperature: float,
    device: torch.device,
) -> Tensor:
    """(B,) float64 on CPU."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    ids, mask = _pad(rows, pad_id=0, left=False)  # the padding's token does not matter: nothing that counts sees it
    starts = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)  # (B, 1)
    positions = torch.arange(1, ids.size(1)).unsqueeze(0)  # (1, L-1) of the tokens that are predicted
    own = ((positions >= starts) & mask[:, 1:].bool()).to(device)  # (B, L-1)
    ids, mask = ids.to(device), mask.to(device)
    logits = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1]).logits.float() / temperature  # (B, L-1, V)
    chosen = logits.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    per_token = (chosen - logits.logsumexp(dim=2)).double()  # (B, L-1)
    return torch.where(own, per_token, 0.0).sum(dim=1).cpu()


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, then every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's own generation settings: `generate` reads what a call leaves open from there.

    A repetition penalty in a checkpoint's generation_config.json would change the distribution unnoticed. An adapter
    and its base model both have settings.
    """
    owners: list[Any] = [m for m in model.modules() if isinstance(vars(m).get("generation_config"), GenerationConfig)]
    own = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, own, strict=True):
            owner.generation_config = config


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A random state of its own."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
