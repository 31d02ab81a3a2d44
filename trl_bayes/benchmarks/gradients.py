"""Bias and variance of every gradient estimator along the way to the posterior, by enumeration and on long texts."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor

from ..divergences import get_divergence
from ..language_models.settings import at_least
from . import gradient_successes
from .exact_training import problems
from .gradient_estimators import SEQUENCE_LEVEL, Candidate, candidates, mixture, rao_blackwellized, with_past
from .gradient_moments import Moments, gradient_moments
from .gradient_scenes import Scene, far_away, path
from .jobs import in_order
from .section import Findings, SectionArguments, check_words
from .tables import markdown_table


_PROBLEMS = problems()
_LONG = {f"random-{length}": length for length in (8, 32, 64)}
_ROUNDING = 1e-15
"""A variance that is none: that of rounding, where every coefficient is zero."""


@dataclass
class GradientsArguments(SectionArguments):
    r"""
    Arguments of the section, besides those of [`~trl_bayes.benchmarks.section.SectionArguments`].

    Parameters:
        problems (`list[str]`, *optional*, defaults to `["letters", "random-32", "random-64"]`): tasks: those of
            `exact`, whose gradient is known; and `random-8`, `random-32` and `random-64`, of so many tokens.
        draws (`int`, *optional*, defaults to `200`): of each estimator: a group of every prompt.
        group_size (`int`, *optional*, defaults to `16`): completions of a group.
        seed (`int`, *optional*, defaults to `0`): of all draws.
        num_parallel (`int`, *optional*, defaults to `2`): tasks at the same time, each with one CPU thread.
    """

    page: ClassVar[str] = "gradients"

    problems: list[str] = field(
        default_factory=lambda: ["letters", "random-32", "random-64"],
        metadata={"help": f"Tasks: {', '.join([*_PROBLEMS, *_LONG])}."},
    )
    draws: int = field(default=200, metadata={"help": "Draws of each estimator: a group of every prompt."})
    group_size: int = field(default=16, metadata={"help": "Completions of a group."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})
    num_parallel: int = field(default=2, metadata={"help": "Tasks at the same time, each on one CPU thread."})

    def __post_init__(self) -> None:
        check_words("problems", self.problems, (*_PROBLEMS, *_LONG))
        at_least("draws", self.draws, 4)
        at_least("group_size", self.group_size, 2)
        at_least("seed", self.seed, 0)
        at_least("num_parallel", self.num_parallel)


class Row(NamedTuple):
    """An estimator at a policy."""

    task: str
    policy: str
    kl_prior: float
    """KL(pi||pi_0) in nats, the mean of the KL of each visited position over all draws."""
    estimator: str
    squared_gradient: float
    """`|g|^2` of the exact gradient; `NaN` where it is not known."""
    moments: Moments
    relative_variance: float
    """Over that of the sequence-level reverse KL at the same policy."""

    def to_record(self) -> dict[str, Any]:
        """As JSON, without a level of its own for the moments."""
        flat = {**self._asdict(), **self.moments._asdict()}
        del flat["moments"]
        return flat


def run(args: GradientsArguments, progress: Progress) -> Iterator[Findings]:
    """Draws every estimator at every policy of every task."""
    for found in in_order(jobs(args), args.num_parallel, progress, "gradients"):
        rows = [row for rows in found for row in rows]
        yield Findings([row.to_record() for row in rows], to_markdown(rows, args))


def jobs(args: GradientsArguments) -> list[Callable[[], list[Row]]]:
    """A task each."""
    return [partial(measure, name, args.draws, args.group_size, args.seed) for name in dict.fromkeys(args.problems)]


def measure(name: str, draws: int, group_size: int, seed: int) -> list[Row]:
    """All estimators at all policies of a task."""
    scenes = far_away(_LONG[name]) if name in _LONG else path(_PROBLEMS[name])
    return [row for scene in scenes for row in measure_at(scene, draws, group_size, seed)]


def measure_at(scene: Scene, draws: int, group_size: int, seed: int) -> list[Row]:
    """
    All estimators at one policy.

    The shares of the mixtures are chosen on a quarter as many draws of their own, so the estimators stay unbiased.
    """
    tested = [each for each in candidates() if scene.log_z is not None or not each.needs_log_z]
    if scene.hard:
        tested = [each for each in tested if get_divergence(each.divergence).allows_hard_constraints]
    else:
        tested += _tuned(scene, max(4, draws // 4), group_size, seed + 1)
    found, kl_prior = gradients(scene, tested, draws, group_size, seed)
    rows, reference = [], 0.0
    for each in tested:
        exact = None if scene.exact_gradient is None else scene.exact_gradient(each.divergence)
        moments = gradient_moments(found[each.name], exact)
        reference = moments.variance if each.name == SEQUENCE_LEVEL else reference
        squared = math.nan if exact is None else exact.double().square().sum().item()
        relative = moments.variance / reference if reference > _ROUNDING else math.nan
        rows.append(Row(scene.task, scene.policy, kl_prior, each.name, squared, moments, relative))
    return rows


def gradients(
    scene: Scene, tested: Sequence[Candidate], draws: int, group_size: int, seed: int
) -> tuple[dict[str, Tensor], float]:
    """Draws `(n, D)` of each estimator by name, all of the same completions; and their mean KL from the prior."""
    found: dict[str, list[Tensor]] = {each.name: [] for each in tested}
    weights, distances = list(scene.model.parameters()), []
    for groups in scene.draw(draws, group_size, seed):
        scored = [scene.score(which, completions) for which, completions in enumerate(groups)]
        distances += [group.token_kl.detach().sum(dim=1).mean().item() for group in scored]
        for each in tested:
            value = torch.stack([each.surrogate(group) for group in scored]).mean()
            parts = torch.autograd.grad(value, weights, retain_graph=True)
            found[each.name].append(torch.cat([part.flatten() for part in parts]))
    return {name: torch.stack(each) for name, each in found.items()}, sum(distances) / len(distances)


def _tuned(scene: Scene, draws: int, group_size: int, seed: int) -> list[Candidate]:
    """Mixtures with the share that has the least variance on draws of their own."""
    first = candidates()[0].surrogate
    ends = {"past": with_past(1.0), "rao": rao_blackwellized}
    tried = [Candidate(name, "reverse_kl", surrogate) for name, surrogate in {"first": first, **ends}.items()]
    found, _ = gradients(scene, tried, draws, group_size, seed)
    past, rao = (best_share(found["first"], found[name]) for name in ends)
    return [
        Candidate("KL-RL, share of the past", "reverse_kl", with_past(past)),
        Candidate("KL-RL, share of Rao-Blackwellized", "reverse_kl", mixture(first, rao_blackwellized, rao)),
    ]


def best_share(first: Tensor, second: Tensor) -> float:
    """The `w` in [0, 1] with the least variance of `(1 - w) first + w second`, from paired draws `(n, D)`."""
    first, second = first - first.mean(dim=0), second - second.mean(dim=0)
    difference = first - second
    norm = difference.square().sum().item()
    return min(1.0, max(0.0, (first * difference).sum().item() / norm)) if norm > 0 else 0.0


def to_markdown(rows: Sequence[Row], args: GradientsArguments) -> str:
    """The section's part of the page."""
    text = (
        f"Each draw is a group of {args.group_size} completions of every prompt; {args.draws} draws, seed "
        f"{args.seed}; standard errors in brackets. `|g|²` is that of the exact gradient, by enumeration, and `bias²` "
        "and `variance` are of the whole gradient, in the same units. `relative` is the variance over that of the "
        "sequence-level reverse KL at the same policy."
    )
    columns = ["task", "policy", "KL(π‖π₀)", "estimator", r"\|g\|²", "bias²", "variance", "relative"]
    lines = []
    for row in rows:
        moments = row.moments
        cells = [
            row.task,
            row.policy,
            f"{row.kl_prior:.2g}",
            row.estimator,
            _scientific(row.squared_gradient),
            _with_error(moments.squared_bias, moments.squared_bias_error),
            _with_error(moments.variance, moments.variance_error),
            "" if math.isnan(row.relative_variance) else f"{row.relative_variance:.3g}",
        ]
        lines.append(cells)
    successes = (
        "Rewards of 0 and 1 at `beta=0.1`, at the prior and at a prompt's first visit: squared error of the gradient "
        "from a group of 16 over that with the true Z, exactly; in brackets that of the mean of 16 groups of one "
        "prompt, in which bias counts 16 times as much. KL-RL needs no Z."
    )
    return "\n\n".join(["## Gradients", text, markdown_table(columns, lines), successes, gradient_successes.table()])


def _scientific(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2g}"


def _with_error(value: float, error: float) -> str:
    return "" if math.isnan(value) else f"{value:.2g} ({error:.1g})"
