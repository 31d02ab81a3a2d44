"""The papers' figures: panels whose lines have colors for the color-blind, and markers and dashes for print."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..evaluation.figures import png, run_style


_NUM_MARKERS = 7  # of a line with many points


def panels(
    draw: Callable[[Sequence[Axes]], None], columns: int, rows: int = 1, *, width: float = 4.3, height: float = 3.6
) -> bytes:
    """
    A figure with panels side by side.

    Args:
        draw (`Callable`): draws into the panels, row by row.
        columns, rows (`int`): how many there are.
        width, height (`float`, *optional*): of a panel, in inches.

    Returns:
        A PNG file.
    """

    def drawn() -> Figure:
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        draw(list(figure.subplots(rows, columns, squeeze=False).flat))
        return figure

    return png(drawn, dpi=110)


def curve(
    axes: Axes,
    x: Sequence[float],
    runs: Sequence[Sequence[float]],
    index: int,
    label: str | None,
    *,
    band: float = 0.15,
    **style: Any,
) -> None:
    """
    The mean over seeds as a line, and a band from the smallest to the largest.

    Args:
        axes ([`~matplotlib.axes.Axes`]): where.
        x (`list[float]`): n positions.
        runs (`list[list[float]]`): n values of each seed.
        index (`int`): which color, marker and dash.
        label (`str`, *optional*): for the legend.
        band (`float`, *optional*, defaults to `0.15`): how opaque the band is; less where many lie on each other.
        style: of the line, in place of what the index gives.
    """
    values = numpy.asarray(runs, dtype=float)  # (S, n)
    look = {**run_style(index), "markersize": 4.5, "linewidth": 1.5, "markevery": max(1, len(x) // _NUM_MARKERS)}
    axes.plot(x, values.mean(axis=0), **{**look, **style}, label=label)
    low, high = values.min(axis=0), values.max(axis=0)
    axes.fill_between(x, low, high, color=style.get("color", look["color"]), alpha=band, linewidth=0)


def finish(axes: Axes, title: str, x: str, y: str, legend: bool = True, **legend_style: Any) -> None:
    """Labels of a panel, and plain numbers on a logarithmic axis."""
    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale == "log":
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if legend:
        axes.legend(**{"fontsize": 8, **legend_style})
