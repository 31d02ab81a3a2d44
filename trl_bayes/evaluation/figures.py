"""The report's two figures, drawn with matplotlib and returned as PNG. No global state: no pyplot, no backend.

Colors are those of Okabe and Ito, which color-blind readers can tell apart; markers and line styles differ too.
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from ..statistics.estimate import Estimate


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
REFERENCE = "#222222"
_STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
}
# A linear axis would press what is close to the posterior into a corner when another run is this many times farther
_WIDE = 5.0


@dataclass(frozen=True)
class Series:
    """One run in a figure: its points in the order of `samples`; `last` is measured with the most samples."""

    label: str
    samples: Sequence[int]
    metrics: Sequence[dict[str, Estimate]]
    last: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """One metric against samples, with the level that the posterior itself has."""

    metric: str
    title: str
    unit: str
    level: Estimate | None = None
    is_share: bool = False
    is_distance: bool = False


def _drawable(estimate: Estimate | None) -> bool:
    return estimate is not None and estimate.trusted and math.isfinite(estimate.value)


def _half_width(estimate: Estimate) -> float:
    """Two standard errors; nothing where there is none."""
    return 2 * estimate.standard_error if math.isfinite(estimate.standard_error) else 0.0


def run_style(index: int) -> dict[str, Any]:
    return {
        "color": COLORS[index % len(COLORS)],
        # shifted by one each time the colors begin again
        "marker": _MARKERS[(index + index // len(COLORS)) % len(_MARKERS)],
        "linestyle": _LINES[(index + index // len(COLORS)) % len(_LINES)],
    }


def _root(values: Any) -> Any:
    array = numpy.asarray(values, dtype=float)
    return numpy.sign(array) * numpy.sqrt(numpy.abs(array))


def _square(values: Any) -> Any:
    array = numpy.asarray(values, dtype=float)
    return numpy.sign(array) * array**2


def _is_wide(values: Iterable[float], small: float) -> bool:
    """Whether the largest value is far beyond a small one that has to be legible too."""
    return max((abs(value) for value in values), default=0.0) > _WIDE * max(abs(small), 0.05)


def _root_ticks(largest: float) -> list[float]:
    """Zero and the numbers 1, 2, 5 times a power of ten that are far enough apart on a square-root axis."""
    exponent = math.floor(math.log10(largest))
    candidates = [digit * 10.0**power for power in range(exponent, exponent - 3, -1) for digit in (5, 2, 1)]
    ticks: list[float] = []
    for tick in candidates:
        if tick <= largest and (not ticks or math.sqrt(ticks[-1]) - math.sqrt(tick) > 0.1 * math.sqrt(largest)):
            ticks.append(tick)
    return [0.0, *(tick for tick in reversed(ticks) if math.sqrt(tick) > 0.1 * math.sqrt(largest))]


def _use_root_scale(axes: Axes, largest: float) -> None:
    """A vertical axis that shows zero, what is close to it and what is far away."""
    axes.set_yscale("function", functions=(_root, _square))
    axes.set_ylim(-0.006 * largest, 1.1 * largest)
    ticks = _root_ticks(largest)
    axes.yaxis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])


def png(draw: Callable[[], Figure], dpi: int = 180) -> bytes:
    with rc_context(_STYLE):
        figure = draw()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def tradeoff_figure(
    series: Sequence[Series],
    reward_label: str,
    is_share: bool,
    posterior: dict[str, Estimate],
    prior: dict[str, Estimate],
) -> bytes:
    """Reward against KL(pi||pi_0): each run's way from its first checkpoint to its end, and the posterior's point.

    Args:
        series: the runs, with the metrics `kl_prior` and `reward`.
        reward_label: of the vertical axis.
        is_share: whether the reward is a share, shown in per cent.
        posterior, prior: metrics of the two references; empty where there is none.

    Returns:
        A PNG file.
    """

    def draw() -> Figure:
        points = [_way(one) for one in series]
        zoomed = has_close_up(series, posterior)
        figure = Figure(figsize=(9.4 if zoomed else 6.6, 4.4), layout="constrained")
        all_axes = figure.subplots(1, 2 if zoomed else 1, squeeze=False)[0]
        for axes in all_axes:
            for index, (one, way) in enumerate(zip(series, points, strict=True)):
                _draw_way(axes, one.label, way, index)
            _draw_reference(axes, posterior, "exact posterior", "*", 17, (-8, 14))
            _draw_reference(axes, prior, "prior", "o", 8, (-5, -21))
            axes.margins(x=0.08, y=0.16)
            axes.set_xlabel("KL(π‖π₀), nats")
            if is_share:
                axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        all_axes[0].set_ylabel(reward_label)
        if zoomed:
            all_axes[0].set_title("All runs", fontsize=11, loc="left", fontweight="bold")
            all_axes[1].set_title("Near the posterior", fontsize=11, loc="left", fontweight="bold")
            all_axes[1].set_xlim(-0.2 * posterior["kl_prior"].value, 2.4 * posterior["kl_prior"].value)
        _legend(figure)
        return figure

    return png(draw)


def has_close_up(series: Sequence[Series], posterior: dict[str, Estimate]) -> bool:
    """Whether [`tradeoff_figure`] shows the surroundings of the posterior enlarged: some run ends far beyond it."""
    own = posterior.get("kl_prior")
    if own is None or not _drawable(own) or not own.value:
        return False
    return _is_wide((kl.value for one in series for kl, _ in _way(one)[-1:]), own.value)


def _way(one: Series) -> list[tuple[Estimate, Estimate]]:
    """(kl_prior, reward) of the checkpoints and of the end."""
    return [
        (metrics["kl_prior"], metrics["reward"])
        for metrics in [*one.metrics, one.last]
        if _drawable(metrics.get("kl_prior")) and _drawable(metrics.get("reward"))
    ]


def _draw_way(axes: Axes, label: str, way: list[tuple[Estimate, Estimate]], index: int) -> None:
    style = run_style(index)
    x, y = [kl.value for kl, _ in way], [reward.value for _, reward in way]
    axes.plot(x, y, **{**style, "markersize": 4, "linewidth": 1.4, "alpha": 0.75})
    axes.errorbar(
        x[-1:],
        y[-1:],
        xerr=[_half_width(kl) for kl, _ in way[-1:]],
        yerr=[_half_width(reward) for _, reward in way[-1:]],
        **{**style, "markersize": 9, "markeredgecolor": "white"},
        capsize=3,
        label=label,
        zorder=3,
    )


def _draw_reference(
    axes: Axes, metrics: dict[str, Estimate], label: str, marker: str, size: int, offset: tuple[int, int]
) -> None:
    """A reference's point with its name above or below it."""
    kl, reward = metrics.get("kl_prior"), metrics.get("reward")
    if kl is None or reward is None or not (_drawable(kl) and _drawable(reward)):
        return
    axes.errorbar(
        [kl.value],
        [reward.value],
        xerr=[_half_width(kl)],
        yerr=[_half_width(reward)],
        fmt=marker,
        color=REFERENCE,
        markersize=size,
        markerfacecolor=REFERENCE if marker == "*" else "white",
        capsize=3,
        zorder=5,
    )
    axes.annotate(
        label,
        (kl.value, reward.value),
        xytext=offset,
        textcoords="offset points",
        fontweight="bold",
        color=REFERENCE,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        zorder=6,
    )


def _legend(figure: Figure) -> None:
    """One for all panels, with every label once."""
    every = [axes.get_legend_handles_labels() for axes in figure.axes]
    named = {label: handle for handles, labels in every for handle, label in zip(handles, labels, strict=True)}
    if named:
        rows = math.ceil(len(named) / 4)
        columns = math.ceil(len(named) / rows)  # so that the rows are about as long
        figure.legend([*named.values()], [*named], loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns)


def learning_curves_figure(series: Sequence[Series], panels: Sequence[Panel]) -> bytes:
    """Metrics against the completions drawn in training, a panel each, with the posterior's own level dashed.

    Bands are two standard errors to either side. What is not finite, or not trusted, is left out, and so is a panel or
    a run of which nothing is left.

    Returns:
        A PNG file.
    """

    def draw() -> Figure:
        shown = [panel for panel in panels if any(_curve(one, panel) for one in series)] or panels[:1]
        rows = math.ceil(len(shown) / 2)
        figure = Figure(figsize=(8.6, 3.4 * rows), layout="constrained")
        all_axes = figure.subplots(rows, 2, squeeze=False)
        for axes in all_axes.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, panel in zip(all_axes.flat, shown, strict=False):
            _draw_panel(axes, panel, series)
        _legend(figure)
        return figure

    return png(draw)


def _curve(one: Series, panel: Panel) -> list[tuple[int, Estimate]]:
    """(completions drawn, estimate) of a run in a panel."""
    return [
        (samples, metrics[panel.metric])
        for samples, metrics in zip(one.samples, one.metrics, strict=True)
        if _drawable(metrics.get(panel.metric))
    ]


def _draw_panel(axes: Axes, panel: Panel, series: Sequence[Series]) -> None:
    drawn: list[float] = []
    for index, one in enumerate(series):
        points = _curve(one, panel)
        if not points:
            continue
        x, y = [samples for samples, _ in points], [estimate.value for _, estimate in points]
        style = run_style(index)
        axes.plot(x, y, **{**style, "markersize": 4.5, "linewidth": 1.6}, label=one.label)
        low = [estimate.value - _half_width(estimate) for _, estimate in points]
        high = [estimate.value + _half_width(estimate) for _, estimate in points]
        if panel.is_share:
            low, high = [max(0.0, value) for value in low], [min(1.0, value) for value in high]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        drawn += y
    if panel.level is not None and _drawable(panel.level):
        axes.axhline(panel.level.value, color=REFERENCE, linestyle=(0, (4, 3)), linewidth=1.4, label="exact posterior")
    axes.set_title(panel.title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel("completions drawn")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    wide = panel.is_distance and bool(drawn) and _is_wide(drawn, sorted(drawn)[len(drawn) // 2])
    if wide:
        _use_root_scale(axes, max(drawn))
    axes.set_ylabel(f"{panel.unit}{', square-root scale' if wide else ''}")
    if panel.is_share:
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.04))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
