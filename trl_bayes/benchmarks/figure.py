"""The benchmark's figure: how close each trainer is to the posterior, against completions and against seconds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from ..evaluation.figures import COLORS, REFERENCE, png, run_style


_FEW_DECADES = 2.0  # an axis of less would have hardly any tick at powers of ten alone
_GREY = "#808080"  # where the colors of the report begin again


@dataclass(frozen=True)
class Curve:
    """One training run: `values` (n,) of a divergence after `samples` (n,) completions and `seconds` (n,)."""

    method: str
    samples: Sequence[int]
    seconds: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class TrainingCurves:
    """One problem: its runs, several of a method with different seeds, and the prior's own divergence."""

    title: str
    curves: Sequence[Curve]
    start: float | None = None
    methods: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", list(dict.fromkeys(curve.method for curve in self.curves)))


def divergence_figure(problems: Sequence[TrainingCurves]) -> bytes:
    """
    A row for each problem: KL(p‖π) against completions on the left, against seconds of training on the right.

    Lines are means over seeds, bands go from the smallest to the largest. All axes are logarithmic, so what is not
    positive, and the start of training, is left out.

    Args:
        problems (`list[TrainingCurves]`): a row for each.

    Returns:
        A PNG file.
    """
    methods = list(dict.fromkeys(method for problem in problems for method in problem.methods))

    def draw() -> Figure:
        figure = Figure(figsize=(10.5, 3.5 * max(1, len(problems))), layout="constrained")
        rows = figure.subplots(max(1, len(problems)), 2, squeeze=False, sharey="row")
        for (left, right), problem in zip(rows, problems, strict=False):
            for axes, against in ((left, "samples"), (right, "seconds")):
                for method in problem.methods:
                    _draw_method(axes, problem, method, against, methods.index(method))
                _finish(axes, problem, against)
            left.set_title(problem.title, fontsize=11, loc="left", fontweight="bold")
            left.set_ylabel("KL(p‖π), nats")
        found = {
            text: line for axes in rows.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if found:
            figure.legend(
                found.values(), found.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(4, len(found))
            )
        return figure

    return png(draw)


def _draw_method(axes: Axes, problem: TrainingCurves, method: str, against: str, index: int) -> None:
    """The mean over seeds of the points that all seeds have, with the band."""
    curves = [curve for curve in problem.curves if curve.method == method]
    points: list[tuple[float, list[float]]] = []
    for place in range(min(len(curve.values) for curve in curves)):
        values = [curve.values[place] for curve in curves]
        begun = all(curve.samples[place] > 0 for curve in curves)
        if begun and all(numpy.isfinite(value) and value > 0 for value in values):
            points.append((statistics.mean(getattr(curve, against)[place] for curve in curves), values))
    if not points:
        return
    x_values, style = [x for x, _ in points], run_style(index)
    if index >= len(COLORS):
        style["color"] = _GREY
    axes.plot(
        x_values,
        [statistics.mean(values) for _, values in points],
        **{**style, "markersize": 5, "linewidth": 1.6},
        label=method,
    )
    low, high = [min(values) for _, values in points], [max(values) for _, values in points]
    axes.fill_between(x_values, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _finish(axes: Axes, problem: TrainingCurves, against: str) -> None:
    """Logarithmic axes with plain numbers, and the prior's level."""
    if problem.start is not None and problem.start > 0:
        axes.axhline(problem.start, color=REFERENCE, linestyle=(0, (4, 3)), linewidth=1.2, label="the prior")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("completions drawn" if against == "samples" else "seconds of training")
    for axis, limits, formatter in (
        (axes.xaxis, axes.get_xlim(), EngFormatter(sep="") if against == "samples" else _plain()),
        (axes.yaxis, axes.get_ylim(), _plain()),
    ):
        few = numpy.log10(limits[1] / limits[0]) < _FEW_DECADES
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
        axis.set_major_formatter(formatter)
        axis.set_minor_formatter(NullFormatter())


def _plain() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:g}")
