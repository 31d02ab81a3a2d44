"""Tiny models and tasks whose completions can all be enumerated: what the tests and the benchmark train on.

A task is an alphabet of letters, a few prompts, a maximum length and a reward; its prior is a random Llama of about
25,000 parameters whose vocabulary is exactly the letters and EOS, so that the probabilities of all completions sum to
one. `EnumerableTask.evaluate` then says, without sampling, how far a trained policy is from the posterior.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .enumeration import (
    Completions,
    ExactPosterior,
    PolicyFit,
    compare,
    completion_log_probs,
    enumerate_completions,
    exact_posterior,
    mean_fit,
)


EOS = "<eos>"


def build_tiny_tokenizer(letters: Sequence[str]) -> PreTrainedTokenizerBase:
    """One token a letter, letters separated by spaces, EOS last and used for padding (on the left)."""
    vocabulary = {token: index for index, token in enumerate([*letters, EOS])}
    # No unknown token: a letter outside the alphabet is an error, and the vocabulary has nothing that is not sampled.
    tokenizer = Tokenizer(WordLevel(vocabulary))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, padding_side="left")


def build_tiny_model(
    folder: str | os.PathLike[str],
    letters: str = "abcdef",
    seed: int = 0,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    logit_std: float = 1.0,
) -> str:
    """Save a tiny random Llama (float32) and its tokenizer to a folder that `from_pretrained` loads offline.

    The prior is clearly not uniform and depends on the whole context: embeddings have standard deviation 1, inner
    matrices 1/sqrt(inputs), and the LM head `logit_std`/sqrt(hidden_size), which after the final norm gives logits
    with standard deviation `logit_std`. All weights come from a generator of their own, so they depend on the
    arguments alone (not on how transformers initializes) and the caller's random state is left as it was.

    Args:
        folder: where to save; made if it is not there.
        letters: the alphabet, one character a token. EOS is added; the vocabulary is exactly these.
        seed: of the weights.
        hidden_size, num_layers, num_heads: of the Llama; the default has 24,160 parameters.
        logit_std: standard deviation of the prior's logits, in nats; 0 is the uniform prior.

    Returns:
        The folder as a string.

    Raises:
        ValueError: letters that repeat, are spaces, or are missing.
    """
    if not letters or len(set(letters)) != len(letters) or any(letter.isspace() for letter in letters):
        raise ValueError(f"letters must be distinct characters other than spaces, got {letters!r}")
    tokenizer = build_tiny_tokenizer(letters)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=80,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = LlamaForCausalLM(config).float()
    _init_weights(model, seed, logit_std)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return os.fspath(folder)


@torch.no_grad()
def _init_weights(model: LlamaForCausalLM, seed: int, logit_std: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim < 2:
            continue  # the norms' gains stay 1
        if name == "lm_head.weight":
            std = logit_std * weight.shape[1] ** -0.5
        elif name == "model.embed_tokens.weight":
            std = 1.0
        else:
            std = weight.shape[1] ** -0.5
        weight.normal_(std=std, generator=generator)


@dataclass(frozen=True)
class EnumerableTask:
    """A task on letters with every completion known: prompts, reward, prior (by seed) and the exact evaluation.

    Attributes:
        letters: the alphabet; the prior's vocabulary is these and EOS.
        max_completion_length: T, the most tokens in a completion, EOS included. N completions follow from the two.
        prompts: such as "a" or "b c".
        reward: completion texts ("a b c", without EOS) to rewards, a function of the text alone. A completion that was
            cut at T tokens is one with T letters; one that ended with EOS has fewer.
        seed: of the prior's weights.
        logit_std: standard deviation of the prior's logits, in nats; 0 is the uniform prior.
    """

    letters: str
    max_completion_length: int
    prompts: tuple[str, ...]
    reward: Callable[[list[str]], list[float]]
    seed: int = 0
    logit_std: float = 1.0

    def build_model(self, folder: str | os.PathLike[str]) -> str:
        """Save the task's prior and tokenizer to a folder and return it; see `build_tiny_model`."""
        return build_tiny_model(folder, letters=self.letters, seed=self.seed, logit_std=self.logit_std)

    @property
    def num_completions(self) -> int:
        """N, of each prompt."""
        return sum(len(self.letters) ** length for length in range(self.max_completion_length + 1))

    def dataset(self, num_rows: int) -> Dataset:
        """A dataset with the column "prompt": the prompts in turn, repeated to `num_rows` rows."""
        return Dataset.from_dict({"prompt": [self.prompts[row % len(self.prompts)] for row in range(num_rows)]})

    def reward_func(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        """The reward in the form that TRL's trainers call."""
        return self.reward(completions)

    def completions(self, tokenizer: PreTrainedTokenizerBase) -> Completions:
        """All completions, ids and mask (N, T); computed once."""
        return _enumerated(self, *_alphabet(self, tokenizer))

    def rewards(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Each completion's reward (N,) float64, in the order of `completions`; computed once."""
        return _rewards(self, *_alphabet(self, tokenizer)).clone()  # a caller may change its own

    def log_probs(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float = 1.0
    ) -> Tensor:
        """log pi(y|x) of all completions after each prompt, (num_prompts, N) float64, in nats."""
        prompt_ids = tokenizer(text=list(self.prompts))["input_ids"]
        completions = self.completions(tokenizer)
        return torch.stack([completion_log_probs(model, ids, completions, temperature) for ids in prompt_ids])

    def posteriors(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prior: PreTrainedModel | Tensor,
        log_potential_fn: Callable[[Tensor], Tensor],
        temperature: float = 1.0,
    ) -> list[ExactPosterior]:
        """The exact posterior of each prompt.

        Args:
            tokenizer: the prior's.
            prior: the prior model, or its `log_probs` (num_prompts, N), which saves scoring it again.
            log_potential_fn: rewards (N,) to phi (N,), for instance `lambda rewards: rewards / beta`.
            temperature: the sampling temperature, used when `prior` is a model.

        Raises:
            ValueError: as `exact_posterior`.
        """
        log_priors = prior if isinstance(prior, Tensor) else self.log_probs(prior, tokenizer, temperature)
        log_potential = log_potential_fn(self.rewards(tokenizer))
        return [exact_posterior(log_prior, log_potential) for log_prior in log_priors]

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prior: PreTrainedModel | Tensor,
        log_potential_fn: Callable[[Tensor], Tensor],
        temperature: float = 1.0,
    ) -> PolicyFit:
        """How far a policy is from the posterior, exactly, averaged over the prompts; arguments as `posteriors`."""
        posteriors = self.posteriors(tokenizer, prior, log_potential_fn, temperature)
        log_policies = self.log_probs(model, tokenizer, temperature)
        return mean_fit([compare(*pair) for pair in zip(posteriors, log_policies, strict=True)])


def _alphabet(task: EnumerableTask, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], int]:
    """The letters' token ids and EOS's: what the enumeration depends on, and hashable where a tokenizer is not."""
    vocabulary = tokenizer.get_vocab()
    if set(vocabulary) != {*task.letters, tokenizer.eos_token}:
        raise ValueError(f"the tokenizer has the tokens {sorted(vocabulary)}, the task {sorted(task.letters)} and EOS")
    return tuple(vocabulary[letter] for letter in task.letters), vocabulary[tokenizer.eos_token]


@lru_cache(maxsize=16)
def _enumerated(task: EnumerableTask, token_ids: tuple[int, ...], eos_token_id: int) -> Completions:
    return enumerate_completions(token_ids, eos_token_id, task.max_completion_length)


@lru_cache(maxsize=16)
def _rewards(task: EnumerableTask, token_ids: tuple[int, ...], eos_token_id: int) -> Tensor:
    letter_of = dict(zip(token_ids, task.letters, strict=True))
    ids = _enumerated(task, token_ids, eos_token_id).ids.tolist()
    texts = [" ".join(letter_of[token] for token in row if token != eos_token_id) for row in ids]
    return torch.tensor(task.reward(texts), dtype=torch.float64)


def _letter_count_reward(texts: list[str]) -> list[float]:
    return [text.count("a") - text.count("b") / 2 for text in texts]


def letter_count_task() -> EnumerableTask:
    """A soft reward, #a - #b/2, meant for phi = reward / 0.7; 1,555 completions for each of 4 prompts."""
    return EnumerableTask("abcdef", 4, ("a", "b", "c d", "e f a"), _letter_count_reward, seed=0)


def _two_a_reward(texts: list[str]) -> list[float]:
    return [float(text.count("a") >= 2) for text in texts]


def hard_constraint_task() -> EnumerableTask:
    """A rare event, at least two "a", meant for phi = log(reward); 19,608 completions for each of 4 prompts.

    The prior is nearly uniform, as that of a freshly initialized model, and the event's probability under it, Z, is
    0.084 on average over the prompts. No prompt is a row of "a": with attention by relative position and no first
    token a model cannot count equal tokens, so it could not tell "a a" after the prompt "a" from "a" after "a a".
    """
    return EnumerableTask("abcdefg", 5, ("b", "c d", "e f g", "g b d c"), _two_a_reward, seed=0, logit_std=0.1)


_BIGRAM_LENGTH = 5


def _bigram_reward(texts: list[str]) -> list[float]:
    return [text.count("a b") - float(len(text.split()) == _BIGRAM_LENGTH) for text in texts]


def bigram_task() -> EnumerableTask:
    """Order and length count: +1 for each "a b", -1 when cut without EOS; 1,365 completions for each of 4 prompts.

    Meant for phi = reward / 0.5.
    """
    return EnumerableTask("abcd", _BIGRAM_LENGTH, ("a", "b", "c d", "d a b"), _bigram_reward, seed=2)


def _balance_reward(texts: list[str]) -> list[float]:
    return [-abs(text.count("a") - text.count("b")) + text.endswith("c") / 2 for text in texts]


def balance_task() -> EnumerableTask:
    """As many "a" as "b", and "c" at the end if possible; 1,093 completions for each of 4 prompts.

    Meant for phi = reward / 0.6. No prompt is a row of equal letters, which the model could not count; see
    `hard_constraint_task`.
    """
    return EnumerableTask("abc", 6, ("b c", "c a", "a c b", "c b a"), _balance_reward, seed=3)
