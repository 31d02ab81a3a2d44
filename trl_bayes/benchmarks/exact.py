"""Trainers side by side where the posterior is known exactly: where each run ends, in nats, and what it cost."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.progress import Progress

from .enumeration import PolicyFit
from .exact_training import (
    ExactProblem,
    ExactRun,
    mixing,
    preferring,
    problems,
    replaying,
    reusing,
    smaller,
    train,
    trainers,
)
from .figure import TrainingCurves
from .jobs import in_order
from .learning_curve import log_spaced
from .noise_free import NAME, divergence_of, limit_method, train_without_noise
from .section import Findings, check_words
from .tables import markdown_table
from .trainings import TrainerSetup, TrainingsArguments, check_parts, chosen, curves_of


_PROBLEMS = problems()


@dataclass
class ExactArguments(TrainingsArguments):
    r"""
    Arguments of the section, besides those of [`~trl_bayes.benchmarks.trainings.TrainingsArguments`].

    Parameters:
        problems (`list[str]`, *optional*, defaults to `["letters", "hard-20k"]`): tasks: `letters`, `bigrams` and
            `balance`, which are soft; `hard-20k` and `hard-100k`, one constraint with two budgets. `samples` defaults
            to 20,480, and most have a budget of 102,400.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2, 3, 4]`): seeds of the trainings.
        largest_limit (`int`, *optional*, defaults to `2000`): completions a prompt up to which the noise-free limit is
            computed. The hard tasks have 19,608, and a step on all of them takes seconds.

    `methods` also names trainers that replay (`--methods replay`), that use a batch four times (`--methods updates`),
    that have a quarter of the batch (`--methods batches`), that take a share of each group from the prior (`--methods
    prior`) and XPO (`--methods XPO`); without it they are left out.
    """

    problems: list[str] = field(
        default_factory=lambda: ["letters", "hard-20k"],
        metadata={"help": f"Tasks: {', '.join(_PROBLEMS)}."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Seeds of the trainings."})
    largest_limit: int = field(
        default=2000, metadata={"help": "Completions a prompt up to which the noise-free limit is computed."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_words("problems", self.problems, tuple(_PROBLEMS))
        check_parts([setup for name in self.problems for setup in _every(_PROBLEMS[name])], self.methods)

    @property
    def most_samples(self) -> int:
        """Completions of a training, at most."""
        return self.samples or (512 if self.quick else 20_480)


def run(args: ExactArguments, progress: Progress) -> Iterator[Findings]:
    """Trains every chosen trainer on every problem with every seed, and each divergence without noise."""
    for runs in in_order(jobs(args), args.num_parallel, progress, "exact tasks"):
        yield Findings([to_record(run) for run in runs], to_markdown(runs, args.how()), _curves(runs))


def jobs(args: ExactArguments) -> list[Callable[[], ExactRun]]:
    """For each problem its limits, one a divergence, and a training for each trainer and seed."""
    found: list[Callable[[], ExactRun]] = []
    for problem in (_PROBLEMS[name] for name in dict.fromkeys(args.problems)):
        setups = _asked_for(problem, args.methods)
        steps = problem.steps(args.most_samples)
        settings: Any = {"evaluate_at": log_spaced(steps), "max_steps": steps, "use_cpu": args.use_cpu}
        divergences = dict.fromkeys(divergence_of(setup).name for setup in setups)
        if problem.task.num_completions <= args.largest_limit:
            found += [partial(train_without_noise, problem, divergence, **settings) for divergence in divergences]
        for setup in setups:
            updates = problem.updates(steps, setup)
            own = {**settings, "evaluate_at": log_spaced(updates), "max_steps": updates}
            found += [partial(train, problem, setup, seed=seed, **own) for seed in args.seeds]
    return found


def _asked_for(problem: ExactProblem, parts: Sequence[str]) -> list[TrainerSetup]:
    """
    Trainers by parts of their names, all that are not special if there are none: each part takes those of the first
    family that has any, so that `DPGTrainer` is not also the one with small batches.
    """
    if not parts:
        return trainers(problem)
    families = _families(problem)
    asked = {setup.name for part in parts for setup in next(filter(None, (chosen(of, [part]) for of in families)), [])}
    return [setup for family in families for setup in family if setup.name in asked]


def _families(problem: ExactProblem) -> list[list[TrainerSetup]]:
    return [
        [*trainers(problem), *preferring(problem)],
        replaying(problem),
        reusing(problem),
        smaller(problem),
        mixing(problem),
    ]


def _every(problem: ExactProblem) -> list[TrainerSetup]:
    return [setup for family in _families(problem) for setup in family]


def to_markdown(runs: Sequence[ExactRun], how: str) -> str:
    """The section's part of the page."""
    text = (
        f"All completions are known, so every distance is exact. Over {how}. `{NAME}` is the same optimizer, schedule "
        "and number of steps on the exact gradient of a divergence, and `× limit` a trainer's KL(p‖π) in multiples of "
        "what that reaches on the trainer's own divergence: median, and smallest to largest over seeds. The other "
        "columns are means. Seconds are those of training."
    )
    return "\n\n".join(["## Exact tasks", text, table(runs), curve_tables(runs)])


def table(runs: Sequence[ExactRun]) -> str:
    """A row per problem and trainer, with `KL(p||pi)` in nats and in multiples of the noise-free limit."""
    columns = "problem, trainer, samples, KL(p‖π) median, worst, × limit, KL(π‖p), TV, mass outside, seconds"
    groups, rows = _groups(runs), []
    for (problem, method), group in groups.items():
        forward, reverse, variation, outside = (
            [getattr(run.final, name) for run in group]
            for name in ("forward_kl", "reverse_kl", "total_variation", "mass_outside")
        )
        limit = groups.get((problem, _limit_of(problem, method)), [])
        rows.append(
            [
                problem,
                method,
                f"{group[0].samples:,}",
                f"{statistics.median(forward):.4f}",
                f"{max(forward):.4f}",
                _multiples(forward, limit),
                _number(statistics.mean(reverse)),
                f"{statistics.mean(variation):.4f}",
                f"{statistics.mean(outside):.4f}",
                f"{statistics.mean(run.seconds for run in group):.1f}",
            ]
        )
    return markdown_table(columns.split(", "), rows)


def _limit_of(problem: str, method: str) -> str:
    """The run without noise that a trainer is compared with; no name for what is none of the problem's trainers."""
    setups = {setup.name: setup for setup in _every(_PROBLEMS[problem])}
    return limit_method(setups[method]) if method in setups else ""


def _multiples(values: Sequence[float], limit: Sequence[ExactRun]) -> str:
    """Median and range of some `KL(p||pi)` over that of the limit."""
    if not limit:
        return ""
    middle, least, most = (pick(values) / limit[0].final.forward_kl for pick in (statistics.median, min, max))
    return f"{middle:.2f}" if len(values) == 1 else f"{middle:.2f} ({least:.2f} to {most:.2f})"


def curve_tables(runs: Sequence[ExactRun]) -> str:
    """For each problem a table of `KL(p||pi)`, mean over seeds: a row per trainer, a column per number of samples."""
    tables = []
    for name in dict.fromkeys(run.problem for run in runs):
        groups = _groups(run for run in runs if run.problem == name)
        columns = sorted({point.samples for group in groups.values() for run in group for point in run.curve})
        rows = []
        for (_, method), group in groups.items():
            found: dict[int, list[float]] = {}
            for point in (point for run in group for point in run.curve):
                found.setdefault(point.samples, []).append(point.value.forward_kl)
            cells = [f"{statistics.mean(found[samples]):.4f}" if samples in found else "" for samples in columns]
            rows.append([method, *cells])
        tables.append(markdown_table([f"{name}: KL(p‖π) after", *(f"{samples:,}" for samples in columns)], rows))
    return "\n\n".join(tables)


def _groups(runs: Iterable[ExactRun]) -> dict[tuple[str, str], list[ExactRun]]:
    """The seeds of each problem and trainer, in the order in which these come."""
    groups: dict[tuple[str, str], list[ExactRun]] = {}
    for run in runs:
        groups.setdefault((run.problem, run.method), []).append(run)
    return groups


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "∞"


def _curves(runs: Sequence[ExactRun]) -> list[TrainingCurves]:
    groups = [[run for run in runs if run.problem == name] for name in dict.fromkeys(run.problem for run in runs)]
    return [curves_of(group, lambda fit: fit.forward_kl, group[0].curve[0].value.forward_kl) for group in groups]


def to_record(run: ExactRun) -> dict[str, Any]:
    """A run as JSON."""
    return run.to_record("fit", PolicyFit._asdict, PolicyFit._asdict)
