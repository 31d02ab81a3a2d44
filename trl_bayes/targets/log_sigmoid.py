"""Rewards that count up to a reference of the prior: the conjunction of several."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..prior import Context
from .per_prompt import PerPromptTarget


class LogSigmoidCentered(PerPromptTarget):
    """
    Several rewards that must all be good: `phi = sum_k log sigmoid(r_k - ref_k) / gamma`.

    `log sigmoid` rewards improvement up to the reference and hardly beyond it, so that a sum of rewards means "all of
    them" and not "one of them, as far as it goes". `ref_k(x)` is a quantile of the reward under the prior for the same
    prompt. See [Transforming and Combining Rewards](https://huggingface.co/papers/2402.00742).

    A reward that does not apply adds nothing, nor does one that no prior sample of the prompt has.

    Args:
        rewards (`str` or `list[str]`, *optional*):
            Names of the reward functions to combine. Defaults to all but those of weight 0.
        gamma (`float`, *optional*, defaults to `1.0`):
            Temperature, positive.
        quantile (`float`, *optional*, defaults to `0.85`):
            Which quantile of the prior's rewards is the reference, in (0, 1).
    """

    def __init__(self, rewards: str | Sequence[str] | None = None, gamma: float = 1.0, quantile: float = 0.85):
        super().__init__(rewards)
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"`LogSigmoidCentered` needs a positive finite `gamma` (a temperature), got {gamma}.")
        if not 0 < quantile < 1:
            raise ValueError(
                f"`LogSigmoidCentered` needs a `quantile` between 0 and 1, both excluded, got {quantile}."
            )
        self.gamma = float(gamma)
        self.quantile = float(quantile)

    def learn(self, rewards: torch.Tensor) -> torch.Tensor:
        """The references `(P, K')`; `NaN` where no prior sample has the reward."""
        # Prompt by prompt: torch's quantile has a largest input
        return torch.stack([self.select(each).nanquantile(self.quantile, dim=0) for each in rewards])

    def log_potential(self, rewards: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        selected, references = self.select(rewards), self.learned(context).to(rewards)  # (N, K')
        if selected.shape != references.shape:
            raise ValueError(
                f"`LogSigmoidCentered` has learned of {references.size(1)} rewards and reads {selected.size(1)}: the "
                "checkpoint is of another version, so train from the beginning."
            )
        centered = selected - references
        total = torch.nn.functional.logsigmoid(centered).nansum(dim=1)
        return total.masked_fill(centered.isnan().all(dim=1), torch.nan) / self.gamma

    def max_log_potential(self) -> float:
        return 0.0

    def settings(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "quantile": self.quantile, **super().settings()}
