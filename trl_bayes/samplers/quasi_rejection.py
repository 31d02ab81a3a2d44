"""Quasi-rejection sampling: bounded error for any evidence and any proposal, traded against acceptance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy
import torch
from torch import Tensor

from ..language_models.completions import Completions
from ..language_models.settings import at_least
from ..statistics.estimate import MIN_EFFECTIVE_SAMPLES, Estimate
from ..statistics.log_z import log_z_per_prompt
from .base import Method, as_draws, setting
from .rejection import accept_until
from .source import CompletionSource


_QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)  # of the weights, where the trade-off is shown


class TradeOff(NamedTuple):
    """What a bound B costs and what it gives, estimated from samples of q.

    `log_bound` log B in nats; `acceptance_rate` E_q[min(1, P/(B q))]; `total_variation` TV(p, p_B); and
    `total_variation_bound` P_p[P > B q], which is at least as large, with its `standard_error`.
    """

    log_bound: float
    acceptance_rate: float
    total_variation: float
    total_variation_bound: float
    standard_error: float


@dataclass(frozen=True)
class QuasiRejection(Method):
    """
    Accepts a completion of the proposal q with probability `min(1, P/(B q))`, whether B is a bound or not.

    The draws are independent and follow `p_B ∝ min(P, B q)`, which is as far from the posterior as it has probability
    where B is no bound (https://huggingface.co/papers/2112.05702):

        TV(p, p_B) <= P_p[P > B q]

    A larger B is more exact and accepts less; `trade_off` in the diagnostics has both over a grid of B, from the same
    completions. The better the proposal, such as a policy trained by DPG, the better the trade. The weights of the
    draws, `log max(1, P/(B q))`, correct what is left of the error. All these numbers are estimates: a completion so
    rare under q that it was never drawn is in none of them, and they are marked as not trusted where the effective
    number of samples is below 30.

    Args:
        log_bound (`float`, *optional*):
            log B, in nats, for every prompt. By default it is chosen for each prompt from `num_pilot` completions that
            are not used otherwise.
        tolerance (`float`, *optional*, defaults to `0.02`):
            The chosen B is the smallest with an estimated `P_p[P > B q]` of at most this.
        num_pilot (`int`, *optional*, defaults to `512`): completions of each prompt that choose B.
        max_attempts (`int`, *optional*, defaults to `1000`): for each draw that is asked for.
    """

    name: ClassVar[str] = "quasi_rejection"

    log_bound: float | None = setting(None, "log B; by default chosen from a pilot.")
    tolerance: float = setting(0.02, "total variation allowed where B is chosen.")
    num_pilot: int = setting(512, "completions of each prompt in the pilot.")
    max_attempts: int = setting(1000, "completions drawn for each sample, at most.")

    def __post_init__(self) -> None:
        at_least("num_pilot", self.num_pilot)
        at_least("max_attempts", self.max_attempts)
        if self.log_bound is not None and not math.isfinite(self.log_bound):
            raise ValueError(f"`log_bound` must be finite, got {self.log_bound}.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"`tolerance` is a total variation in [0, 1), got {self.tolerance}.")

    def draw(self, source: CompletionSource, n: int, rng: numpy.random.Generator) -> Completions:
        num_prompts = len(source.prompts)
        log_bound = self._log_bounds(source)  # (P,)
        wanted = torch.where(log_bound.isnan(), 0, n)

        def log_accept(candidates: Completions) -> Tensor:
            return (candidates.log_weights - log_bound[candidates.prompt_index]).clamp(max=0.0)

        found = accept_until(source, wanted, log_accept, self.max_attempts, rng)
        of_prompt = [found.log_weights[found.prompt_index == p] for p in range(num_prompts)]
        known = [p for p in range(num_prompts) if of_prompt[p].isfinite().any()]
        diagnostics = found.diagnostics() | {
            "log_bound": {"mean": log_bound.nanmean().item(), "max": log_bound.nan_to_num(nan=-math.inf).max().item()},
            "num_without_bound": int(log_bound.isnan().sum()),
        }
        if known:
            diagnostics |= log_z_per_prompt(found.log_weights, found.prompt_index, num_prompts).to_dict()
            diagnostics["total_variation_bound"] = _average_bound(
                [trade_off(of_prompt[p], log_bound[p : p + 1])[0] for p in known], [of_prompt[p] for p in known]
            ).to_dict()
            diagnostics["trade_off"] = _average_curve([_curve(of_prompt[p]) for p in known])
        draws = found.accepted
        corrections = (draws.log_weights - log_bound[draws.prompt_index]).clamp(min=0.0)
        return as_draws(draws, diagnostics, corrections, n=n)

    def _log_bounds(self, source: CompletionSource) -> Tensor:
        """log B of each prompt (P,); NaN where no completion of the pilot has evidence."""
        num_prompts = len(source.prompts)
        if self.log_bound is not None:
            return torch.full((num_prompts,), self.log_bound, dtype=torch.float64)
        pilot = source.propose(torch.arange(num_prompts).repeat_interleave(self.num_pilot))
        rows = pilot.log_weights.view(num_prompts, self.num_pilot)
        return torch.stack([smallest_bound(row, self.tolerance) for row in rows])


def smallest_bound(log_weights: Tensor, tolerance: float) -> Tensor:
    """The smallest B among the weights (N,) with `P_p[P > B q]` estimated at `tolerance` or less: log B, or NaN."""
    if not log_weights.isfinite().any():
        return log_weights.new_tensor(torch.nan)
    values = log_weights[log_weights.isfinite()].sort().values
    share = values.softmax(dim=0)
    above = 1 - share.cumsum(dim=0)  # of the posterior, at larger weights; equal ones are told apart, to no effect
    return values[torch.nonzero(above <= tolerance + 1e-12)[0, 0]]


def trade_off(log_weights: Tensor, log_bounds: Tensor) -> list[TradeOff]:
    """
    The trade-off between acceptance and error, for several bounds from the same samples of q.

    Args:
        log_weights (`torch.Tensor`): (N,) `log P - log q` of samples of q; not all `-inf`.
        log_bounds (`torch.Tensor`): (G,) log B.

    Returns:
        `list[TradeOff]`: one for each bound.
    """
    share = log_weights.softmax(dim=0)  # (N,) the posterior on the samples
    points = []
    for log_bound in log_bounds:
        log_accept = (log_weights - log_bound).clamp(max=0.0)
        above = (log_weights > log_bound).double()
        bound = (share * above).sum()
        points.append(
            TradeOff(
                log_bound.item(),
                log_accept.exp().mean().item(),
                ((share - log_accept.softmax(dim=0)).abs().sum() / 2).item(),
                bound.item(),
                (share * (above - bound)).square().sum().sqrt().item(),  # of a ratio of means, by the delta method
            )
        )
    return points


def _curve(log_weights: Tensor) -> list[TradeOff]:
    finite = log_weights[log_weights.isfinite()]
    return trade_off(
        log_weights, finite.quantile(torch.tensor(_QUANTILES, dtype=finite.dtype), interpolation="higher")
    )


def _average_curve(curves: Sequence[Sequence[TradeOff]]) -> list[dict[str, Any]]:
    """The mean over prompts at the same quantile of the weights."""
    columns = torch.tensor(curves, dtype=torch.float64)  # (P, G, 5)
    means = columns.mean(dim=0)
    means[:, 4] = columns[:, :, 4].square().sum(dim=0).sqrt() / len(curves)
    rows = [TradeOff(*row)._asdict() for row in means.tolist()]
    return [{"quantile": quantile, **row} for quantile, row in zip(_QUANTILES, rows, strict=True)]


def _average_bound(points: Sequence[TradeOff], weights: Sequence[Tensor]) -> Estimate:
    """The mean over prompts of `P_p[P > B q]`."""
    value = sum(point.total_variation_bound for point in points) / len(points)
    error = math.sqrt(sum(point.standard_error**2 for point in points)) / len(points)
    fewest = min(1 / row.softmax(dim=0).square().sum().item() for row in weights)
    if fewest < MIN_EFFECTIVE_SAMPLES:
        return Estimate(value, error, False, f"only {fewest:.0f} effective samples of the posterior for some prompt")
    note = "" if value > 0 else "no completion above the bound was drawn"
    return Estimate(value, error, note=note)
