"""What a sampling method is, and how it returns what it has drawn."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any, ClassVar, NamedTuple

import numpy
import torch
from torch import Tensor

from ..language_models.completions import Completions
from ..statistics.strict_json import strict_json
from ..targets import Target
from .source import CompletionSource


class Mixture(NamedTuple):
    """What a method samples instead of the proposal: coefficients of the logits of three models at every token."""

    prior: float
    proposal: float
    base: float = 0.0
    """Of what the proposal was trained from, where that is not the prior."""


class Method(ABC):
    """
    A way to sample the posterior: an algorithm on completions and their weights that knows no model.

    A subclass is a frozen dataclass of the algorithm's settings, which it checks when it is made. Each of them is a
    flag of `trl-bayes sample` too, which its help explains if it is made by [`setting`].
    """

    name: ClassVar[str]
    needs_base: ClassVar[bool] = False
    """Whether the method reads the model that the proposal was trained from, besides the proposal."""

    def check(self, target: Target, has_proposal: bool) -> None:  # noqa: B027 - most methods take any target
        """Raises `ValueError`, one sentence, for a target or a proposal that the method cannot work with."""

    def mixture(self) -> Mixture | None:
        """What takes the place of the proposal; `None` for the proposal itself, as most methods have it."""
        return None

    @abstractmethod
    def draw(self, source: CompletionSource, n: int, rng: numpy.random.Generator) -> Completions:
        """
        Draws `n` completions of each prompt, or fewer where the method could not find them.

        Args:
            source ([`CompletionSource`]): where completions come from.
            n (`int`): at least 1.
            rng (`numpy.random.Generator`): of the method's own decisions.

        Returns:
            [`~trl_bayes.language_models.completions.Completions`]: from [`as_draws`].
        """


def setting(default: Any, text: str) -> Any:
    """A field of a [`Method`], with what `trl-bayes sample --help` says of it."""
    return field(default=default, metadata={"help": text})


def at_least_zero(name: str, number: float) -> None:
    """Refuses a factor that is negative or not finite."""
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"`{name}` must be finite and at least 0, got {number}.")


def as_draws(
    completions: Completions,
    diagnostics: Mapping[str, Any],
    log_weights: Tensor | None = None,
    n: int | None = None,
) -> Completions:
    """
    Completions as a method returns them: ordered by prompt, with weights and diagnostics.

    Args:
        completions ([`~trl_bayes.language_models.completions.Completions`]): M that were drawn.
        diagnostics (`Mapping[str, Any]`): what the method says about them.
        log_weights (`torch.Tensor`, *optional*): (M,). Defaults to 0, for draws of the posterior itself.
        n (`int`, *optional*): keeps at most the first n of each prompt.
    """
    weights = torch.zeros(len(completions), dtype=torch.float64) if log_weights is None else log_weights
    draws = completions.with_known(log_weights=weights).sorted_by_prompt()
    if n is not None:
        draws = draws.first_of_each_prompt(torch.full((len(draws.prompts),), n))
    return replace(draws, diagnostics=strict_json(diagnostics))
