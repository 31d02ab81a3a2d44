"""Sequential Monte Carlo over tokens: many unfinished completions at once, of which the promising ones go on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy
import torch
from torch import Tensor

from ..language_models.completions import Completions, Prompt
from ..language_models.settings import at_least
from ..statistics.estimate import Estimate, stratified_mean
from ..statistics.log_z import log_z_per_prompt
from ..targets import Target
from .base import Method, as_draws, setting
from .rejection import Rejection
from .source import CompletionSource, gather


Twist = Callable[[list[Prompt], list[str]], Sequence[float] | Tensor]
"""Evidence of unfinished completions, in nats, from their prompts and texts."""


@dataclass(frozen=True)
class SequentialMonteCarlo(Method):
    r"""
    Grows N completions together; where a twist tells early which are promising, those multiply and others end.

    A run starts with N empty completions (particles). Each of its steps draws some tokens from the proposal q and
    multiplies a particle's weight by what its value has changed, `v(y_<t) = pi_0(y_<t) psi(y_<t) / q(y_<t)`, where
    the twist psi stands for the evidence of what is not written yet, and is `exp(phi)` for a finished completion. When
    the effective number of particles falls below `ess_threshold` N, systematic resampling replaces them by N copies,
    in proportion to their weights. See https://huggingface.co/papers/2404.17546.

    The product of the mean weights estimates Z without bias, whatever the twist, so that

        E[log Z_hat] <= log Z <= E[log Z_hat, conditional]

    where a conditional run has one particle that is, from beginning to end, an exact sample of the posterior. A draw
    has the posterior's law up to O(1/N); weighted by its run's Z_hat, which is its `log_weights`, draws of many runs
    are consistent whatever N is. The draws of one run depend on each other, and may be equal.

    Args:
        num_particles (`int`, *optional*, defaults to `32`): N.
        tokens_per_step (`int`, *optional*, defaults to `4`): tokens between two looks at the weights.
        ess_threshold (`float`, *optional*, defaults to `0.5`): in [0, 1]; 0 never resamples before the end.
        twist (`str` or `Callable`, *optional*, defaults to `"target"`):
            `"target"` is the target's own `partial_log_potential`, summed over the factors of a product that have one.
            Without any there is none: importance sampling, with one resampling at the end. `"rewards"` is the
            target's `phi` of the unfinished text, for rewards that grow as it is written; not for a hard target. A
            function gives `log psi` from prompts and texts.
        draws_per_run (`int`, *optional*):
            How many draws a run gives. Defaults to N; 1 makes all draws independent.
        upper_bound (`bool`, *optional*, defaults to `False`):
            Whether to make as many conditional runs, for the upper bound on log Z. Their exact samples come from
            rejection, so the evidence must be bounded.
        max_log_potential (`float`, *optional*): as for [`Rejection`]; used for `upper_bound`.
    """

    name: ClassVar[str] = "smc"

    num_particles: int = setting(32, "N.")
    tokens_per_step: int = setting(4, "tokens between two looks at the weights.")
    ess_threshold: float = setting(0.5, "resample below this share of effective particles.")
    twist: str | Twist = setting("target", "target or rewards.")
    draws_per_run: int | None = setting(None, "draws of each run; by default all particles.")
    upper_bound: bool = setting(False, "estimate an upper bound on log Z too.")
    max_log_potential: float | None = setting(None, "the largest phi of any completion, for `upper_bound`.")

    def __post_init__(self) -> None:
        at_least("num_particles", self.num_particles)
        at_least("tokens_per_step", self.tokens_per_step)
        if self.draws_per_run is not None:
            at_least("draws_per_run", self.draws_per_run)
        if not 0 <= self.ess_threshold <= 1:
            raise ValueError(f"`ess_threshold` is a share of the particles in [0, 1], got {self.ess_threshold}.")
        if isinstance(self.twist, str) and self.twist not in ("target", "rewards"):
            raise ValueError(f"`twist` is 'target', 'rewards' or a function, got {self.twist!r}.")

    def check(self, target: Target, has_proposal: bool) -> None:
        if self.twist == "rewards" and target.hard:
            raise ValueError(
                f"`twist='rewards'` reads unfinished completions as finished ones, and {target!r} would exclude some "
                "that can still become good: leave it out, or give a function as the twist."
            )
        if self.upper_bound and not target.will_know_its_bound:
            Rejection(self.max_log_potential).bound(target)

    def draw(self, source: CompletionSource, n: int, rng: numpy.random.Generator) -> Completions:
        per_run = self.num_particles if self.draws_per_run is None else min(self.draws_per_run, n)
        num_runs = math.ceil(n / per_run)
        index = torch.arange(len(source.prompts)).repeat_interleave(num_runs)  # (S,)
        runs = self.run(source, index, rng)
        chosen = systematic(runs.log_weights, per_run, rng)  # (S, D) places among a run's particles
        alive = ~runs.log_z.isneginf()
        rows = runs.rows.gather(1, torch.from_numpy(rng.permuted(chosen.numpy(), axis=1)))[alive].flatten()
        log_weights = runs.log_z[alive].repeat_interleave(per_run)
        diagnostics = self._diagnostics(source, runs, index)
        if self.upper_bound:
            diagnostics["log_z_upper"] = self._upper_bound(source, num_runs, rng).to_dict()
        return as_draws(runs.finished.select(rows), diagnostics, log_weights, n=n)

    def run(
        self,
        source: CompletionSource,
        prompt_index: Tensor,
        rng: numpy.random.Generator,
        references: Sequence[list[int]] | None = None,
    ) -> "Runs":
        """
        Runs of N particles, all at once.

        Args:
            source ([`CompletionSource`]): proposes and evaluates.
            prompt_index (`torch.Tensor`): (S,) the prompt of each run.
            rng (`numpy.random.Generator`): of resampling.
            references (`list[list[int]]`, *optional*): S completions; the first particle of each run is made to
                become this one, and the others are drawn as they are given that.
        """
        value_of = _values(source, self.twist)
        step = source.max_new_tokens if value_of is None else self.tokens_per_step
        shape = (len(prompt_index), self.num_particles)
        index = prompt_index.repeat_interleave(self.num_particles)  # (S * N,)
        particles = _Particles.start(index, shape)
        num_resamplings = torch.zeros(shape[0], dtype=torch.int64)
        while len(growing := particles.growing()):
            ids = source.extend(index[growing], [particles.ids[i] for i in growing.tolist()], step)
            if references is not None:
                for place, i in enumerate(growing.tolist()):
                    if i % self.num_particles == 0:
                        ids[place] = references[i // self.num_particles][: len(particles.ids[i]) + step]
            particles.advance(source, growing, ids, value_of)
            # After the last step a resampling would only add noise: the draws are chosen by their weights anyway
            unequal = particles.effective_share() < self.ess_threshold
            runs = torch.nonzero(unequal & particles.is_growing().view(shape).any(dim=1)).squeeze(1)
            for run in runs.tolist():
                particles.resample(run, rng, conditional=references is not None)
                num_resamplings[run] += 1
        finished = gather(source, particles.finished)
        log_z = particles.log_z + _log_mean_exp(particles.log_weights)
        return Runs(finished, particles.row.view(shape), particles.log_weights, log_z, num_resamplings)

    def _diagnostics(self, source: CompletionSource, runs: "Runs", prompt_index: Tensor) -> dict[str, Any]:
        num_prompts = len(source.prompts)
        return {
            "num_particles": self.num_particles,
            "num_runs": len(runs.log_z) // num_prompts,
            "has_twist": _values(source, self.twist) is not None,
            "num_resamplings_per_run": runs.num_resamplings.double().mean().item(),
            "effective_share_at_the_end": _effective_share(runs.log_weights).mean().item(),
            "num_runs_without_evidence": int(runs.log_z.isneginf().sum()),
            "log_z": log_z_per_prompt(runs.log_z, prompt_index, num_prompts).average().to_dict(),
            "log_z_lower": stratified_mean(runs.log_z, prompt_index, num_prompts).to_dict(),
        }

    def _upper_bound(self, source: CompletionSource, num_runs: int, rng: numpy.random.Generator) -> Estimate:
        """`E[log Z_hat]` of conditional runs."""
        exact = Rejection(self.max_log_potential).draw(source, num_runs, rng)
        if not len(exact):
            return Estimate(math.nan, trusted=False, note="rejection found no exact sample")
        runs = self.run(source, exact.prompt_index, rng, exact.completion_ids)
        return stratified_mean(runs.log_z, exact.prompt_index, len(source.prompts))


class Runs(NamedTuple):
    """The end of S runs of N particles."""

    finished: Completions  # completions, in any order
    rows: Tensor  # (S, N) where each particle stands in `finished`; -1 for one that was given up
    log_weights: Tensor  # (S, N)
    log_z: Tensor  # (S,) log Z_hat
    num_resamplings: Tensor  # (S,)


ValueFunction = Callable[[Tensor, list[list[int]]], Tensor]


def _values(source: CompletionSource, twist: str | Twist) -> ValueFunction | None:
    """`log v` of unfinished completions: their `log pi_0 + log psi - log q`; `None` without a twist."""
    if twist == "rewards":
        return lambda index, ids: source.evaluate(index, ids).log_weights
    if isinstance(twist, str) and not source.target.guesses_early:
        return None
    function = source.target.partial_log_potential if isinstance(twist, str) else twist

    def values(index: Tensor, ids: list[list[int]]) -> Tensor:
        log_twist = function([source.prompts[i] for i in index.tolist()], source.decode(ids))
        return source.log_ratio(index, ids) + torch.as_tensor(log_twist, dtype=torch.float64)

    return values


@dataclass(eq=False)
class _Particles:
    """The state of S runs of N particles; what is flat has S * N entries."""

    index: Tensor
    ids: list[list[int]]
    row: Tensor  # where a particle stands among the finished; -1 while it grows
    value: Tensor  # (S, N) log v
    log_weights: Tensor  # (S, N) since the last resampling
    log_z: Tensor  # (S,) of all resamplings so far
    finished: list[Completions] = field(default_factory=list)

    @classmethod
    def start(cls, index: Tensor, shape: tuple[int, int]) -> "_Particles":
        zeros = torch.zeros(shape, dtype=torch.float64)
        return cls(index, [[] for _ in index], torch.full_like(index, -1), zeros, zeros.clone(), zeros[:, 0].clone())

    def is_growing(self) -> Tensor:
        """(S * N,) bool: neither finished nor without weight."""
        return (self.row < 0) & ~self.log_weights.flatten().isneginf()

    def growing(self) -> Tensor:
        return torch.nonzero(self.is_growing()).squeeze(1)

    def advance(
        self, source: CompletionSource, growing: Tensor, ids: list[list[int]], value_of: ValueFunction | None
    ) -> None:
        """Gives the growing particles (M,) their new tokens, values and weights."""
        done = torch.tensor([source.is_finished(row) for row in ids], dtype=torch.bool)  # (M,)
        new = torch.zeros(len(ids), dtype=torch.float64)
        if done.any():
            complete = source.evaluate(self.index[growing[done]], [ids[i] for i in torch.nonzero(done).flatten()])
            self.row[growing[done]] = torch.arange(len(complete)) + sum(map(len, self.finished))
            self.finished.append(complete)
            new[done] = complete.log_weights
        if value_of is not None and not done.all():
            rest = torch.nonzero(~done).squeeze(1)
            new[rest] = value_of(self.index[growing[rest]], [ids[i] for i in rest.tolist()])
        for place, i in enumerate(growing.tolist()):
            self.ids[i] = ids[place]
        self.log_weights.view(-1)[growing] += new - self.value.view(-1)[growing]  # the old value is finite
        self.value.view(-1)[growing] = new

    def effective_share(self) -> Tensor:
        return _effective_share(self.log_weights)

    def resample(self, run: int, rng: numpy.random.Generator, conditional: bool) -> None:
        """Replaces a run's particles by equally weighted copies; the first stays if the run is conditional."""
        size = self.log_weights.size(1)
        weights = self.log_weights[run : run + 1]
        self.log_z[run] += _log_mean_exp(weights)[0]
        chosen = (
            conditional_systematic(weights[0], rng) if conditional else systematic(weights, size, rng)[0]
        ).tolist()
        first = run * size
        self.ids[first : first + size] = [self.ids[first + i] for i in chosen]
        self.row[first : first + size] = self.row[first : first + size][chosen]
        self.value[run] = self.value[run][chosen]
        self.log_weights[run] = 0.0


def _log_mean_exp(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(dim=1) - math.log(log_weights.size(1))


def _effective_share(log_weights: Tensor) -> Tensor:
    """`(sum w)^2 / (N sum w^2)` of each run, (S,); 1 for a run without any weight, which resampling cannot help."""
    log_share = 2 * log_weights.logsumexp(dim=1) - (2 * log_weights).logsumexp(dim=1) - math.log(log_weights.size(1))
    return log_share.exp().nan_to_num(nan=1.0)


def systematic(log_weights: Tensor, size: int, rng: numpy.random.Generator) -> Tensor:
    """
    Systematic resampling: each of N particles is chosen `size` times its share of the weights, up to less than one.

    Args:
        log_weights (`torch.Tensor`): (S, N); a row of `-inf` gives any choice.
        size (`int`): how many are chosen.
        rng (`numpy.random.Generator`): one number for each row.

    Returns:
        `torch.Tensor`: (S, size) int64, ascending.
    """
    offsets = torch.from_numpy(rng.random((len(log_weights), 1)))
    return _at_points(log_weights, (torch.arange(size) + offsets) / size)


def conditional_systematic(log_weights: Tensor, rng: numpy.random.Generator) -> Tensor:
    """
    Systematic resampling (N,) of N particles given that the first becomes the first: entry 0 is 0.

    If copies are put into places at random, the offset u given that some place holds particle 0 has a density in
    proportion to the number of 0's copies at u. Its copies are the points `i + u` in [0, N w_0): so u is the
    fractional part of a uniform number in that interval.

    Args:
        log_weights (`torch.Tensor`): (N,); the first is finite.
        rng (`numpy.random.Generator`): one number.
    """
    size = len(log_weights)
    reach = size * log_weights.softmax(dim=0)[0].item()
    offset = math.fmod(rng.random() * reach, 1.0)
    chosen = _at_points(log_weights.unsqueeze(0), ((torch.arange(size) + offset) / size).unsqueeze(0))[0]
    chosen[0] = 0  # it is already, up to rounding
    return chosen


def _at_points(log_weights: Tensor, points: Tensor) -> Tensor:
    """The particle (S, M) at each point in [0, 1) of the weights' cumulative shares."""
    reach = log_weights.softmax(dim=1).nan_to_num(nan=1.0).cumsum(dim=1)  # (S, N)
    reach = (reach / reach[:, -1:]).contiguous()
    return torch.searchsorted(reach, points.double().contiguous(), right=True).clamp(max=log_weights.size(1) - 1)
