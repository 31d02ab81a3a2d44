"""How completions are drawn: one set of settings for all who draw them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


_MOST_SCORED_AT_ONCE = 64  # large batches make generation fast, but scoring slow, since it holds all logits


@dataclass(frozen=True)
class SamplingSettings:
    """
    Plain ancestral sampling: with the same settings a model gives the same completions.

    Args:
        max_new_tokens (`int`): a completion without a stop token is cut after so many tokens.
        temperature (`float`, *optional*, defaults to `1.0`): of the softmax, in sampling and in scoring.
        batch_size (`int`, *optional*, defaults to `256`): completions generated at once.
        seed (`int`, *optional*, defaults to `0`): of what is drawn.
        stop_ids (`tuple[int, ...]`, *optional*):
            The tokens that end a completion. Defaults to those of the tokenizer and of the model that is sampled, see
            [`~trl_bayes.language_models.generation.find_stop_ids`].
        chat_template_kwargs (`dict`, *optional*): for the chat template, where prompts are lists of messages.
        progress (`bool`, *optional*, defaults to `False`): shows how far long work has got.

    Raises:
        ValueError: a setting out of range; one sentence.
    """

    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 256
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        at_least("max_new_tokens", self.max_new_tokens)
        at_least("batch_size", self.batch_size)
        at_least("seed", self.seed, 0)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"`temperature` must be positive and finite, got {self.temperature}.")

    @property
    def scoring_batch_size(self) -> int:
        """Completions scored at once."""
        return min(self.batch_size, _MOST_SCORED_AT_ONCE)


def at_least(name: str, number: int, least: int = 1) -> None:
    """Refuses a number below `least`."""
    if number < least:
        raise ValueError(f"`{name}` must be at least {least}, got {number}.")
