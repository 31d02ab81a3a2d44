"""Metropolis-Hastings on completions: proposals of whole completions, or of a new end to the current one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy
import torch
from torch import Tensor

from ..language_models.completions import Completions
from ..language_models.settings import at_least
from .base import Method, as_draws, setting
from .source import CompletionSource


Kernel = Literal["prefix", "independence"]


@dataclass(frozen=True)
class MetropolisHastings(Method):
    """
    Markov chains whose stationary law is the posterior; their error falls with the number of steps.

    With `w = P/q`, in which the normalization of the posterior cancels, and L the number of tokens, EOS included:

    - `independence`: propose `y' ~ q`, accept with `min(1, w(y')/w(y))`. With the prior as the proposal that is
      `min(1, exp(phi' - phi))`. If `w <= M Z`, the total variation after s steps is at most `(1 - 1/M)^s`.
    - `prefix` (https://huggingface.co/papers/2504.03790): keep the first k tokens of y, k uniform on 0, ..., L(y) - 1,
      and redraw the rest from q. The pair (y, k) goes to (y', k) with probability `1/L(y) q(y'|y_<k)`, and comes back
      with probability `1/L(y') q(y|y_<k)`, since k < L(y') for every y' that continues the prefix by at least one
      token. As both share the prefix, `q(y|y_<k) / q(y'|y_<k) = q(y)/q(y')`, so that detailed balance holds for
      each k with

          min(1, w(y')/w(y) * L(y)/L(y'))

      The factor of lengths makes up for longer completions having more places to be cut. k = 0 is possible, so every
      completion can be reached.

    Chains start at samples of q. One that starts without evidence moves freely until it finds some, and gives no draw
    if it never does.

    Args:
        kernel (`str`, *optional*, defaults to `"prefix"`): `"prefix"` or `"independence"`.
        num_steps (`int`, *optional*, defaults to `64`): steps before the first draw.
        num_chains (`int`, *optional*):
            Chains of each prompt, all moved at once. By default one for each draw, so that draws are independent;
            fewer give several draws each.
        thin (`int`, *optional*, defaults to `8`): steps between the draws of a chain.
    """

    name: ClassVar[str] = "mcmc"

    kernel: Kernel = setting("prefix", "prefix or independence.")
    num_steps: int = setting(64, "steps before the first draw.")
    num_chains: int | None = setting(None, "chains of each prompt; by default one for each sample.")
    thin: int = setting(8, "steps between the draws of a chain.")

    def __post_init__(self) -> None:
        at_least("num_steps", self.num_steps)
        at_least("thin", self.thin)
        if self.num_chains is not None:
            at_least("num_chains", self.num_chains)
        if self.kernel not in get_args(Kernel):
            raise ValueError(f"`kernel` is one of {list(get_args(Kernel))}, got {self.kernel!r}.")

    def draw(self, source: CompletionSource, n: int, rng: numpy.random.Generator) -> Completions:
        chains = n if self.num_chains is None else min(self.num_chains, n)
        last = self.num_steps + self.thin * (math.ceil(n / chains) - 1)
        state = source.propose(torch.arange(len(source.prompts)).repeat_interleave(chains))
        kept, trace, acceptances = [], [], 0
        for step in range(1, last + 1):
            state, accepted = metropolis_hastings_step(source, state, self.kernel, rng)
            trace.append(torch.stack([state.phi, state.lengths]))
            acceptances += int(accepted.sum())
            if step >= self.num_steps and (step - self.num_steps) % self.thin == 0:
                kept.append(state)
        diagnostics = self._diagnostics(torch.stack(trace), len(source.prompts))
        diagnostics["acceptance_rate"] = acceptances / (last * len(state))
        diagnostics["num_chains_without_evidence"] = int(state.log_weights.isneginf().sum())
        drawn = Completions.concatenate(kept)
        found = torch.nonzero(~drawn.log_weights.isneginf()).squeeze(1)
        return as_draws(drawn.select(found), diagnostics, n=n)

    def _diagnostics(self, trace: Tensor, num_prompts: int) -> dict[str, Any]:
        """How well the chains have settled and mix, from phi and lengths (S, 2, P * C) of their second half."""
        num_steps, _, num_states = trace.shape
        second_half = trace.view(num_steps, 2, num_prompts, num_states // num_prompts)[num_steps // 2 :]
        quantities = {"log_potential": second_half[:, 0], "length": second_half[:, 1]}
        return {
            "kernel": self.kernel,
            "num_steps": num_steps,
            "num_chains": second_half.size(3),
            "r_hat": {name: _worst(split_r_hat, values) for name, values in quantities.items()},
            "autocorrelation_steps": {name: _worst(autocorrelation_time, v) for name, v in quantities.items()},
        }


def metropolis_hastings_step(
    source: CompletionSource, state: Completions, kernel: Kernel, rng: numpy.random.Generator
) -> tuple[Completions, Tensor]:
    """
    One step of every chain.

    Args:
        source ([`CompletionSource`]): proposes.
        state ([`~trl_bayes.language_models.completions.Completions`]): where the C chains are.
        kernel (`str`): which step.
        rng (`numpy.random.Generator`): of cuts and decisions.

    Returns:
        `tuple[Completions, torch.Tensor]`: where they are then, and which have accepted, (C,) bool.
    """
    cuts = numpy.zeros(len(state), dtype=numpy.int64)
    if kernel == "prefix":
        cuts = rng.integers(state.lengths.long().numpy())  # 0, ..., L - 1
    prefixes = [ids[:cut] for ids, cut in zip(state.completion_ids, cuts.tolist(), strict=True)]
    proposed = source.evaluate(state.prompt_index, source.extend(state.prompt_index, prefixes))
    uniform = torch.from_numpy(rng.random(len(state)))
    accepted = uniform < log_acceptance(state, proposed, kernel).exp()
    return proposed.where(accepted, state), accepted


def log_acceptance(current: Completions, proposed: Completions, kernel: Kernel) -> Tensor:
    """
    Log-probability (C,) with which each proposal is accepted, see [`MetropolisHastings`].

    It is 0 where neither has evidence, so that a chain moves until it finds some.
    """
    ratio = proposed.log_weights - current.log_weights
    if kernel == "prefix":
        ratio = ratio + current.lengths.log() - proposed.lengths.log()
    return ratio.nan_to_num(nan=0.0, posinf=0.0, neginf=-torch.inf).clamp(max=0.0)


def _worst(measure: Callable[[Tensor], float], values: Tensor) -> float:
    """The largest over prompts of what a measure gives for (S, P, C); NaN where it exists for none."""
    results = [measure(values[:, p]) for p in range(values.size(1))]
    return max((result for result in results if not math.isnan(result)), default=math.nan)


def split_r_hat(values: Tensor) -> float:
    """
    Split R-hat: the spread of all halves of chains together over the spread within; 1 when they agree.

    See https://arxiv.org/abs/1903.08008.

    Args:
        values (`torch.Tensor`): (S, C), S steps of C chains.

    Returns:
        `float`: NaN for fewer than 4 steps, for values that are not finite, or that never change.
    """
    half = len(values) // 2
    if half < 2 or not values.isfinite().all():
        return math.nan
    halves = torch.cat([values[:half], values[-half:]], dim=1)  # (S/2, 2C)
    within = halves.var(dim=0).mean()
    between = halves.mean(dim=0).var()
    return math.sqrt((half - 1) / half + (between / within).item()) if within > 0 else math.nan


def autocorrelation_time(values: Tensor) -> float:
    """
    Integrated autocorrelation time in steps, `1 + 2 sum_t rho_t`: so many steps are worth one independent draw.

    The sum ends, after Geyer, where the sum of two neighboring autocorrelations is no longer positive. The mean is
    that of all chains, so that chains which never meet show a long time too.

    Args:
        values (`torch.Tensor`): (S, C), S steps of C chains.

    Returns:
        `float`: NaN for fewer than 4 steps, for values that are not finite, or that never change.
    """
    length = len(values)
    if length < 4 or not values.isfinite().all():
        return math.nan
    centered = values - values.mean()
    variance = centered.square().mean().item()
    if variance == 0:
        return math.nan
    time = -1.0
    for lag in range(0, length - 1, 2):
        pair = [(centered[: length - k] * centered[k:]).mean().item() / variance for k in (lag, lag + 1)]
        if sum(pair) <= 0:
            break
        time += 2 * sum(pair)
    return max(time, 1.0)
