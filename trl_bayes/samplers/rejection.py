"""Exact samples of the posterior by rejection from the prior."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy
import torch
from torch import Tensor

from ..language_models.completions import Completions
from ..language_models.settings import at_least
from ..statistics.log_z import log_z_per_prompt
from ..targets import Target
from .base import Method, as_draws, setting
from .source import CompletionSource, SamplingError, gather


_MOST_PER_ROUND = 4096  # completions of one prompt that are held at once


@dataclass(frozen=True)
class Rejection(Method):
    """
    Keeps a completion of the prior with probability `exp(phi - max_log_potential)`: independent, exact samples of p.

    The acceptance rate is `Z exp(-max_log_potential)`: for a [`~trl_bayes.targets.Constraint`], the prior's
    probability of the event. log Z is estimated from all completions that were drawn; since drawing stops when enough
    are accepted, with a relative bias of order 1/n.

    Args:
        max_log_potential (`float`, *optional*):
            The largest `phi` that any completion can have, for instance the largest reward over beta. It need not be
            given where the target has a bound of its own, see [`~trl_bayes.targets.Target.max_log_potential`].
        max_attempts (`int`, *optional*, defaults to `1000`):
            For each draw that is asked for, at most so many completions are drawn. A prompt whose evidence is rarer
            than that gets fewer draws.
    """

    name: ClassVar[str] = "rejection"

    max_log_potential: float | None = setting(
        None, "the largest phi of any completion; a constraint's is known to be 0."
    )
    max_attempts: int = setting(1000, "completions drawn for each sample, at most.")

    def __post_init__(self) -> None:
        at_least("max_attempts", self.max_attempts)
        if self.max_log_potential is not None and not math.isfinite(self.max_log_potential):
            raise ValueError(f"`max_log_potential` must be finite, got {self.max_log_potential}.")

    def check(self, target: Target, has_proposal: bool) -> None:
        if not target.will_know_its_bound:
            self.bound(target)
        if has_proposal:
            raise ValueError(
                "Rejection draws from the prior, since P/q has no known bound for another proposal: leave the "
                "proposal out, or use quasi-rejection."
            )

    def bound(self, target: Target) -> float:
        """
        `max_log_potential`, or the target's own.

        Raises:
            ValueError: neither is known.
        """
        if self.max_log_potential is not None:
            return self.max_log_potential
        bound = target.max_log_potential()
        if bound is None:
            raise ValueError(
                f"Rejection needs evidence with a known upper bound, and {target!r} has none: set `max_log_potential` "
                "to the largest phi that a completion can have (for a tilt, the largest reward over beta), or use "
                "quasi-rejection."
            )
        return bound

    def draw(self, source: CompletionSource, n: int, rng: numpy.random.Generator) -> Completions:
        bound = self.bound(source.target)

        def log_accept(candidates: Completions) -> Tensor:
            highest = candidates.log_weights.max().item()
            if highest > bound + 1e-9:
                raise SamplingError(
                    f"A completion has the log-potential {highest:.6g}, above `max_log_potential={bound:.6g}`: set it "
                    "to the largest that any completion can have."
                )
            return candidates.log_weights - bound

        wanted = torch.full((len(source.prompts),), n)
        found = accept_until(source, wanted, log_accept, self.max_attempts, rng, from_prior=True)
        z = log_z_per_prompt(found.log_weights, found.prompt_index, len(source.prompts), bound)
        diagnostics = {**found.diagnostics(), "max_log_potential": bound, "log_z": z.average().to_dict()}
        return as_draws(found.accepted, diagnostics, n=n)


class Accepted(NamedTuple):
    """What [`accept_until`] found: the completions that were accepted, and of all that were drawn the weights."""

    accepted: Completions
    log_weights: Tensor  # (A,)
    prompt_index: Tensor  # (A,)
    attempts: Tensor  # (P,)
    acceptances: Tensor  # (P,)
    num_unscored: int

    def diagnostics(self) -> dict[str, Any]:
        """Acceptance rates, and how many completions had to be drawn."""
        rates = self.acceptances / self.attempts.clamp(min=1)
        return {
            "acceptance_rate": {"mean": rates.mean().item(), "min": rates.min().item()},
            "num_attempts": int(self.attempts.sum()),
            "num_unscored": self.num_unscored,
        }


def accept_until(
    source: CompletionSource,
    wanted: Tensor,
    log_accept: Callable[[Completions], Tensor],
    max_attempts: int,
    rng: numpy.random.Generator,
    *,
    from_prior: bool = False,
) -> Accepted:
    """
    Draws and accepts until each prompt has as many completions as wanted, or has used up its attempts.

    The first that are accepted are independent, however many are drawn at a time; so more may be accepted than wanted,
    and the caller takes the first.

    Args:
        source ([`CompletionSource`]): where completions come from.
        wanted (`torch.Tensor`): (P,) int64.
        log_accept (`Callable`): log-probabilities with which candidates are accepted, (M,).
        max_attempts (`int`): for each completion wanted.
        rng (`numpy.random.Generator`): of the decisions.
        from_prior (`bool`, *optional*, defaults to `False`): draws from the prior and not from the proposal.
    """
    num_prompts = len(source.prompts)
    attempts, acceptances = torch.zeros(num_prompts, dtype=torch.int64), torch.zeros(num_prompts, dtype=torch.int64)
    accepted, weights, indices, num_unscored = [], [torch.zeros(0, dtype=torch.float64)], [wanted[:0]], 0
    while True:
        missing = torch.where(attempts < wanted * max_attempts, (wanted - acceptances).clamp(min=0), 0)
        if not missing.any():
            break
        rate = (acceptances + 1) / (attempts + 2)
        number = (1.1 * missing / rate).ceil().long().clamp(max=_MOST_PER_ROUND)
        number = torch.minimum(number, wanted * max_attempts - attempts)
        candidates = source.propose(torch.arange(num_prompts).repeat_interleave(number), from_prior=from_prior)
        chosen = torch.from_numpy(rng.random(len(candidates))) < log_accept(candidates).exp()
        accepted.append(candidates.select(torch.nonzero(chosen).squeeze(1)))
        weights.append(candidates.log_weights)
        indices.append(candidates.prompt_index)
        num_unscored += int(candidates.phi.isnan().sum())
        attempts += number
        acceptances += torch.bincount(accepted[-1].prompt_index, minlength=num_prompts)
    found = gather(source, accepted)
    return Accepted(found, torch.cat(weights), torch.cat(indices), attempts, acceptances, num_unscored)
