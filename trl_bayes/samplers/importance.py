"""Samples of the proposal itself, with the weights that make them samples of the posterior."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor

from ..evaluation.evaluate import estimate_log_z, log_z_per_prompt
from .base import Draws, Method, as_draws
from .source import Candidates, CompletionSource


@dataclass(frozen=True)
class Importance(Method):
    """
    Draws from the proposal q, which by default is the prior, and weights them: `log w = log pi_0 + phi - log q`.

    Nothing is left out: a completion without evidence has the weight `-inf`. Averages weighted by `w / sum w` are
    averages over the posterior, with a bias of order `1/ESS`.
    """

    name: ClassVar[str] = "prior"

    def draw(self, source: CompletionSource, n: int, rng: numpy.random.Generator) -> Draws:
        drawn = source.propose(torch.arange(len(source.prompts)).repeat_interleave(n))
        return as_draws(source, drawn, weight_diagnostics(source, drawn), drawn.log_weights)


def weight_diagnostics(source: CompletionSource, candidates: Candidates) -> dict[str, Any]:
    """log Z and what the weights of independent samples of the proposal say of it."""
    weights, index = candidates.log_weights, candidates.prompt_index
    return {**evidence(weights, index, len(source.prompts)), "num_unscored": int(candidates.phi.isnan().sum())}


def evidence(log_weights: Tensor, prompt_index: Tensor, num_prompts: int) -> dict[str, Any]:
    """`log Z` as [`~trl_bayes.evaluation.evaluate.Estimate`], and the smallest effective number of samples.

    Args:
        log_weights (`torch.Tensor`): (N,) in nats.
        prompt_index (`torch.Tensor`): (N,) int64.
        num_prompts (`int`): P.
    """
    partition = log_z_per_prompt(log_weights, prompt_index, num_prompts)
    return {
        "log_z": estimate_log_z(log_weights, prompt_index, num_prompts).to_dict(),
        "effective_samples": {
            "mean": partition.effective_samples.mean().item(),
            "min": partition.effective_samples.min().item(),
        },
    }
