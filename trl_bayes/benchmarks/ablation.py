"""One ingredient at a time: how near the noise-free limit a training ends with it, on tasks of all kinds."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

from rich.progress import Progress

from ..language_models.settings import at_least
from .ablation_methods import Method, limit_of, methods
from .ablation_tasks import ablation_problems
from .ablation_training import Ablation, Budget
from .jobs import in_order
from .section import Findings, SectionArguments, check_words
from .tables import markdown_table


_PROBLEMS = ablation_problems()
_METHODS = {method.name: method for method in methods()}
_MEAN = "mean of the last quarter's weights"
_WITH_MEAN = ("KL-RL (RLOO's estimator)", "DPG")


@dataclass
class AblationArguments(SectionArguments):
    r"""
    Arguments of the section, besides those of [`~trl_bayes.benchmarks.section.SectionArguments`].

    Parameters:
        problems (`list[str]`, *optional*): tasks; all by default.
        methods (`list[str]`, *optional*): parts of the names of the rows; all by default.
        seeds (`int`, *optional*, defaults to `5`): trainings of each row, all at once.
        steps (`int`, *optional*, defaults to `400`): of 256 completions.
        learning_rate (`float`, *optional*, defaults to `0.01`): at the beginning; it falls to 0.
        num_parallel (`int`, *optional*, defaults to `1`): rows at the same time, each with one CPU thread.
    """

    page: ClassVar[str] = "ablation"

    problems: list[str] = field(
        default_factory=lambda: list(_PROBLEMS), metadata={"help": f"Tasks: {', '.join(_PROBLEMS)}."}
    )
    methods: list[str] = field(default_factory=list, metadata={"help": "Parts of the names of the rows; all if none."})
    seeds: int = field(default=5, metadata={"help": "Trainings of each row."})
    steps: int = field(default=400, metadata={"help": "Steps of a training, of 256 completions each."})
    learning_rate: float = field(default=1e-2, metadata={"help": "At the beginning; it falls to 0."})
    num_parallel: int = field(default=1, metadata={"help": "Rows at the same time, each on one CPU thread."})

    def __post_init__(self) -> None:
        check_words("problems", self.problems, tuple(_PROBLEMS))
        for part in self.methods:
            if not any(part in name for name in _METHODS):
                raise ValueError(f"`methods`: {part!r} is part of no row's name: these are {'; '.join(_METHODS)}.")
        at_least("seeds", self.seeds)
        at_least("steps", self.steps)
        at_least("num_parallel", self.num_parallel)

    @property
    def budget(self) -> Budget:
        """Of each training."""
        return Budget(steps=self.steps, learning_rate=self.learning_rate)


class Row(NamedTuple):
    """A method on a task: `KL(p||pi)` in nats of each seed, and with the mean of the last quarter's weights."""

    problem: str
    method: str
    divergence: str
    forward_kl: list[float]
    of_mean_weights: list[float]


def run(args: AblationArguments, progress: Progress) -> Iterator[Findings]:
    """Trains every row on every task."""
    for rows in in_order(jobs(args), args.num_parallel, progress, "ablation"):
        yield Findings([row._asdict() for row in rows], to_markdown(rows, args))


def jobs(args: AblationArguments) -> list[Callable[[], Row]]:
    """For each task the limits, one a divergence, and the chosen rows."""
    found: list[Callable[[], Row]] = []
    for name in dict.fromkeys(args.problems):
        hard = _PROBLEMS[name].target.hard
        wanted = [
            method
            for method in _METHODS.values()
            if (not args.methods or any(part in method.name for part in args.methods))
            and (method.f.allows_hard_constraints or not hard)
        ]
        limits = [limit_of(divergence) for divergence in dict.fromkeys(each.divergence for each in wanted)]
        found += [partial(measure, name, each, 1, args.budget) for each in limits]
        found += [partial(measure, name, each, args.seeds, args.budget) for each in wanted]
    return found


def measure(problem: str, method: Method, seeds: int, budget: Budget) -> Row:
    """The trainings of a row."""
    return Row(problem, method.name, method.divergence, *Ablation(_PROBLEMS[problem], seeds, budget).train(method))


def to_markdown(rows: Sequence[Row], args: AblationArguments) -> str:
    """The section's part of the page."""
    text = (
        f"{args.budget.completions:,} completions in {args.steps} steps of Adam, in groups of "
        f"{args.budget.group_size}; {args.seeds} seeds. KL(p‖π) at the end in multiples of what the same optimizer, "
        "schedule and number of steps reach on the exact gradient of the row's own divergence: median, and the "
        "largest. The policies are small perceptrons, all of whose completions are known; estimators, log Z and what "
        "a replayed completion is compared with are the trainers'. `all` is the geometric mean of the medians over "
        "the tasks that have the row."
    )
    return "\n\n".join(["## Ablation", text, _limits(rows), table(rows)])


def _limits(rows: Sequence[Row]) -> str:
    """The noise-free limits in nats."""
    names = {limit_of(row.divergence).name: row.divergence for row in rows}
    problems = list(dict.fromkeys(row.problem for row in rows))
    found = {(row.problem, row.method): row.forward_kl[0] for row in rows}
    cells = [
        [divergence, *(f"{found[problem, name]:.2g}" if (problem, name) in found else "" for problem in problems)]
        for name, divergence in names.items()
    ]
    return markdown_table(["limit, KL(p‖π)", *problems], cells)


def table(rows: Sequence[Row]) -> str:
    """A row per method, a column per task."""
    limits = {(row.problem, row.divergence): row.forward_kl[0] for row in rows if _is_limit(row)}
    multiples: dict[tuple[str, str], list[float]] = {}
    for row in (row for row in rows if not _is_limit(row)):
        limit = limits[row.problem, row.divergence]
        multiples[row.problem, row.method] = [value / limit for value in row.forward_kl]
        if row.method in _WITH_MEAN:
            multiples[row.problem, f"{row.method}, {_MEAN}"] = [value / limit for value in row.of_mean_weights]
    problems = list(dict.fromkeys(row.problem for row in rows))
    lines = []
    for method in dict.fromkeys(method for _, method in multiples):
        found = [multiples.get((problem, method), []) for problem in problems]
        medians = [statistics.median(values) for values in found if values]
        cells = [f"{statistics.median(values):.2f} ({max(values):.2f})" if values else "" for values in found]
        lines.append([method, *cells, f"{_geometric_mean(medians):.2f}"])
    return markdown_table(["× limit", *problems, "all"], lines)


def _is_limit(row: Row) -> bool:
    return row.method == limit_of(row.divergence).name


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.mean(math.log(value) for value in values))
