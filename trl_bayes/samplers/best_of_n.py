"""Best-of-N: of every N completions, the one with the most evidence."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy
import torch

from ..language_models.completions import Completions
from ..language_models.settings import at_least
from .base import Method, as_draws, setting
from .source import CompletionSource


@dataclass(frozen=True)
class BestOfN(Method):
    """
    Draws N completions from the proposal and returns the one with the largest `phi`.

    Its law is not the posterior of the given target but one of its own, whatever beta is. If `phi` is continuous, its
    density with respect to the proposal is `N u^(N-1)`, u the quantile of `phi`, and its divergence from it is

        KL(best-of-N||q) = log N - (N-1)/N

    (https://huggingface.co/papers/2407.06057; [`~trl_bayes.targets.Calibrated`] with `best_of_n` has this law as its
    posterior). With ties, as with 0 and 1, the divergence is smaller. The draws have no weights: `log_weights` is 0. A
    group in which nothing has evidence (`phi = -inf`, or no reward) gives no draw.

    Args:
        num_candidates (`int`, *optional*, defaults to `4`): N, at least 1.
    """

    name: ClassVar[str] = "best_of_n"

    num_candidates: int = setting(4, "N.")

    def __post_init__(self) -> None:
        at_least("num_candidates", self.num_candidates)

    def draw(self, source: CompletionSource, n: int, rng: numpy.random.Generator) -> Completions:
        size = self.num_candidates
        drawn = source.propose(torch.arange(len(source.prompts)).repeat_interleave(n * size))
        phi = drawn.phi.nan_to_num(nan=-torch.inf, neginf=-torch.inf).view(-1, size)  # (P * n, N)
        best = phi.max(dim=1)
        # Among equals any choice will do that does not look at the completion: candidates are exchangeable
        chosen = torch.arange(len(phi)) * size + best.indices
        found = ~best.values.isneginf()
        diagnostics = {
            "num_candidates": size,
            "kl_to_proposal_at_most": kl_of_best_of_n(size),
            "log_potential": {"proposal": _mean(phi), "best": _mean(best.values)},
        }
        return as_draws(drawn.select(chosen[found]), diagnostics)


def kl_of_best_of_n(n: int) -> float:
    """`KL(best-of-n||q) = log n - (n-1)/n` in nats, for evidence without ties; with ties an upper bound."""
    return math.log(n) - (n - 1) / n


def _mean(phi: torch.Tensor) -> float:
    return phi[~phi.isneginf()].mean().item()
