"""Samples of the proposal itself, with the weights that make them samples of the posterior."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
import torch

from ..language_models.completions import Completions
from ..statistics.log_z import log_z_per_prompt
from .base import Method, as_draws
from .source import CompletionSource


@dataclass(frozen=True)
class Importance(Method):
    """
    Draws from the proposal q, which by default is the prior, and weights them: `log w = log pi_0 + phi - log q`.

    Nothing is left out: a completion without evidence has the weight `-inf`. Averages weighted by `w / sum w` are
    averages over the posterior, with a bias of order `1/ESS`.
    """

    name: ClassVar[str] = "prior"

    def draw(self, source: CompletionSource, n: int, rng: numpy.random.Generator) -> Completions:
        drawn = source.propose(torch.arange(len(source.prompts)).repeat_interleave(n))
        return as_draws(drawn, weight_diagnostics(drawn), drawn.log_weights)


def weight_diagnostics(drawn: Completions) -> dict[str, Any]:
    """log Z and what the weights of independent samples of the proposal say of it."""
    z = log_z_per_prompt(drawn.log_weights, drawn.prompt_index, len(drawn.prompts))
    return {**z.to_dict(), "num_unscored": int(drawn.phi.isnan().sum())}
