"""What some targets must know of a completion besides its rewards."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Context(NamedTuple):
    """What some targets must know of `N` completions besides their rewards; see `Target.needs_context`."""

    log_prior: torch.Tensor
    """`log pi_0(y|x)` of shape `(N,)`, in nats, at the sampling temperature."""
    prompt_key: torch.Tensor
    """Which prompt each completion belongs to: int64 of shape `(N,)`, the keys of [`PriorScores`]."""


LogPotential = Callable[[torch.Tensor, Context], torch.Tensor]
"""`phi` `(N,)` of rewards `(N, K)` and their context: what a target is to those who only evaluate it."""
