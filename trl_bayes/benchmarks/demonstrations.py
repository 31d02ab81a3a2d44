"""Demonstration-regularized RL where the expert is known: KL to the clone, and what RL from it lacks, against N."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.progress import Progress

from ..evaluation.figures import REFERENCE, png, run_style
from ..statistics.demonstrations import kl_from_expert, temperature_by_rule
from .jobs import quiet
from .section import Findings, SectionArguments
from .table_policies import SUCCESS, Budget, ChainTask, chain_task, clone, draw_demonstrations, regularized_rl, slope
from .tables import markdown_table


_FLOORS: dict[str, dict[str, float]] = {
    "none": {},
    "one count": {"one_count": 1.0},
    "5 of the prior": {"prior_completions": 5.0},
    "20 of the prior": {"prior_completions": 20.0},
    "100 of the prior": {"prior_completions": 100.0},
}
_USED = "one count"  # the paper's, under the clones that RL starts from
_FIXED = (0.01, 0.1, 1.0)
_EPSILONS = (0.01, 0.1)
_LAST = 3  # numbers of demonstrations from which a second slope is taken


@dataclass
class DemonstrationsArguments(SectionArguments):
    r"""
    Arguments of the section, besides those of [`~trl_bayes.benchmarks.section.SectionArguments`].

    Parameters:
        numbers (`list[int]`, *optional*, defaults to `[10, 30, 100, 300, 1000]`): of demonstrations.
        seeds (`list[int]`, *optional*, defaults to 0 to 4): of the demonstrations and of RL.
        steps (`int`, *optional*, defaults to `40`): updates of RL, of 64 completions each.
        learning_rate (`float`, *optional*, defaults to `0.1`): Adam's, which falls linearly; the same for all.
    """

    page: ClassVar[str] = "demonstrations"

    numbers: list[int] = field(
        default_factory=lambda: [10, 30, 100, 300, 1000], metadata={"help": "Numbers of demonstrations."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Of demonstrations and RL."})
    steps: int = field(default=40, metadata={"help": "Updates of RL, of 64 completions each."})
    learning_rate: float = field(default=0.1, metadata={"help": "Of Adam; it falls linearly to 0."})

    def __post_init__(self) -> None:
        if not self.numbers or min(self.numbers) < 2:
            raise ValueError(f"`numbers={self.numbers}` must be numbers of demonstrations, 2 or more.")
        if not self.seeds or self.steps < 1:
            raise ValueError(f"`seeds={self.seeds}` and `steps={self.steps}` must leave something to do.")

    @property
    def budget(self) -> Budget:
        """Of each RL."""
        return Budget(self.steps, learning_rate=self.learning_rate)


@dataclass(frozen=True)
class Row:
    """A number of demonstrations and a seed: the clones, and where RL from one of them ends."""

    number: int
    seed: int
    kl: dict[str, float]
    """KL(expert||clone) of each floor; infinite without one."""
    kl_held_out: float
    """Of the clone that is used, estimated from N / 5 further demonstrations and the expert's true entropy."""
    cloned: float
    """Sub-optimality of the clone itself."""
    trained: dict[str, float]
    """Sub-optimality after RL from the clone, by lambda."""


def run(args: DemonstrationsArguments, progress: Progress) -> Iterator[Findings]:
    """Measures RL from the prior, then every number of demonstrations with every seed."""
    quiet()
    task = chain_task()
    bar = progress.add_task("demonstrations", total=len(args.seeds) * (1 + len(args.numbers)))
    from_prior: list[dict[str, float]] = []
    rows: list[Row] = []
    for seed in args.seeds:
        from_prior.append(_from_prior(task, args.budget, seed))
        progress.advance(bar)
    for number in args.numbers:
        for seed in args.seeds:
            rows.append(measure(task, number, seed, args.budget))
            progress.advance(bar)
        record = {"from_prior": from_prior, "rows": [vars(row) for row in rows]}
        yield Findings(record, to_markdown(rows, from_prior, args), figure=figure(rows, from_prior))


def measure(task: ChainTask, number: int, seed: int, budget: Budget) -> Row:
    """Clones and RL for one number of demonstrations and one seed."""
    drawn = draw_demonstrations(task, number, seed)
    clones = {name: clone(task, drawn, **floor) for name, floor in _FLOORS.items()}
    start = clones[_USED]
    kl = {name: task.kl_from_expert(table) for name, table in clones.items()}
    held_out = draw_demonstrations(task, max(2, number // 5), seed + 1000)
    entropy = -(task.log_expert.exp() * task.log_expert).sum().item()
    estimate = kl_from_expert(task.log_probs(start, held_out), entropy).value
    trained = {
        name: task.suboptimality(regularized_rl(task, start, temperature, budget, seed))
        for name, temperature in _temperatures(kl[_USED]).items()
    }
    return Row(number, seed, kl, estimate, task.suboptimality(start), trained)


def _temperatures(kl: float | None) -> dict[str, float]:
    """The fixed ones, and with a clone those by the rule."""
    fixed = {f"λ = {value:g}": value for value in _FIXED}
    if kl is None:
        return fixed
    return {f"rule, ε = {epsilon:g}": temperature_by_rule(epsilon, kl) for epsilon in _EPSILONS} | fixed


def _from_prior(task: ChainTask, budget: Budget, seed: int) -> dict[str, float]:
    return {
        name: task.suboptimality(regularized_rl(task, task.prior, temperature, budget, seed))
        for name, temperature in _temperatures(None).items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is told


def _numbers(rows: Sequence[Row]) -> list[int]:
    return sorted({row.number for row in rows})


def _mean(rows: Sequence[Row], number: int, value: Any) -> float:
    return statistics.mean(value(row) for row in rows if row.number == number)


def to_markdown(rows: Sequence[Row], from_prior: Sequence[dict[str, float]], args: DemonstrationsArguments) -> str:
    """The section's part of the page."""
    text = (
        "A chain of letters: 4 of 5,461 completions have the reward 1, the others 0. Policies are tables, and the "
        f"expert is {1 - SUCCESS:.1f} below the best. Means over the seeds {args.seeds}. RL draws "
        f"{args.budget.completions:,} completions each time; the clone that it starts from has the floor “{_USED}”."
    )
    return "\n\n".join(["## Demonstration-regularized RL", text, _table_of_kl(rows), _table_of_rl(rows, from_prior)])


def _table_of_kl(rows: Sequence[Row]) -> str:
    numbers = _numbers(rows)
    lines = []
    for name in _FLOORS:
        values = [_mean(rows, number, lambda row, name=name: row.kl[name]) for number in numbers]
        finite = len(values) > 1 and all(map(math.isfinite, values))
        slopes = [slope(numbers, values), slope(numbers[-_LAST:], values[-_LAST:])] if finite else []
        lines.append([name, *map(_cell, values), *([f"{each:.2f}" for each in slopes] or ["", ""])])
    spread = [
        f"{_mean(rows, number, lambda row: row.kl_held_out):.3f} ± "
        f"{_deviation([row.kl_held_out - row.kl[_USED] for row in rows if row.number == number]):.3f}"
        for number in numbers
    ]
    lines.append([f"{_USED}, by N / 5 held out, ± error of one seed", *spread, "", ""])
    columns = ["KL(expert‖clone), nats; floor", *map("N = {:,}".format, numbers), "slope", f"of the last {_LAST}"]
    return markdown_table(columns, lines)


def _table_of_rl(rows: Sequence[Row], from_prior: Sequence[dict[str, float]]) -> str:
    numbers = _numbers(rows)
    lines = [["the clone", *(f"{_mean(rows, number, lambda row: row.cloned):.3f}" for number in numbers), ""]]
    for name in rows[0].trained:
        cells = [f"{_mean(rows, number, lambda row, name=name: row.trained[name]):.3f}" for number in numbers]
        without = [found[name] for found in from_prior if name in found]
        last = f"{statistics.mean(without):.3f}" if without else ""
        lines.append([f"RL, {name}", *cells, last])
    return markdown_table(["sub-optimality", *map("N = {:,}".format, numbers), "from the prior"], lines)


def _deviation(values: Sequence[float]) -> float:
    """Root of the mean square."""
    return math.sqrt(statistics.mean(value**2 for value in values))


def _cell(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "∞"


def figure(rows: Sequence[Row], from_prior: Sequence[dict[str, float]]) -> bytes:
    """KL(expert||clone) by floor with a line of slope -1, and sub-optimality, both against N; bands are the seeds'."""
    numbers = _numbers(rows)

    def draw() -> Figure:
        page = Figure(figsize=(12.0, 4.2), layout="constrained")
        left, right = page.subplots(1, 2)
        for index, name in enumerate(name for name in _FLOORS if name != "none"):
            _draw(left, rows, lambda row, name=name: row.kl[name], f"floor: {name}", index)
        first = _mean(rows, numbers[-1], lambda row: row.kl[_USED]) * numbers[-1]
        left.plot(numbers, [first / number for number in numbers], color=REFERENCE, linestyle=":", label="slope -1")
        left.set_ylabel("KL(expert‖clone), nats")
        _draw(right, rows, lambda row: row.cloned, "the clone alone", 0)
        for index, name in enumerate(rows[0].trained):
            _draw(right, rows, lambda row, name=name: row.trained[name], f"RL, {name}", index + 1)
        best = min(statistics.mean(found[name] for found in from_prior) for name in from_prior[0])
        right.axhline(best, color=REFERENCE, linestyle="--", linewidth=1.2, label="RL from the prior, best λ")
        right.axhline(1 - SUCCESS, color=REFERENCE, linestyle=":", linewidth=1.2, label="the expert")
        right.set_ylabel("sub-optimality")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("demonstrations N")
            axes.set_xticks(numbers)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            for axis in (axes.xaxis, axes.yaxis):  # plain numbers: powers of ten would need the markup of formulas
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.legend(fontsize=8)
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the lines
        return page

    return png(draw)


def _draw(axes: Any, rows: Sequence[Row], value: Any, label: str, index: int) -> None:
    numbers, style = _numbers(rows), run_style(index)
    groups = [[value(row) for row in rows if row.number == number] for number in numbers]
    axes.plot(numbers, [statistics.mean(group) for group in groups], label=label, **{**style, "markersize": 4})
    axes.fill_between(
        numbers, [min(group) for group in groups], [max(group) for group in groups], color=style["color"], alpha=0.12
    )
