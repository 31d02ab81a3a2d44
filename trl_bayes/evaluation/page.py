"""One HTML page for a report, a single file with its figures inside; it loads nothing and runs no script."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..statistics.estimate import Estimate
from ..statistics.strict_json import strict_json
from .figures import Panel, Series, has_close_up, learning_curves_figure, tradeoff_figure
from .files import REPORT, write_json
from .report import Report, RunRecord
from .tables import DIVERSITY_COLUMNS, distance_columns, reward_columns, tabulate


def _series(run: RunRecord) -> Series:
    points = sorted(run.curve, key=lambda point: point.samples)
    metrics = [point.metrics for point in points]
    last = run.evaluation.metrics if run.evaluation is not None else {}
    return Series(run.label, [point.samples for point in points], metrics, last)


def _reference_metrics(row: RunRecord | None) -> dict[str, Estimate]:
    return row.evaluation.metrics if row is not None and row.evaluation is not None else {}


def _figures(report: Report) -> dict[str, bytes]:
    """PNG files by name; a figure without a point to draw is left out."""
    series = [_series(run) for run in report.runs]
    references = [_reference_metrics(row) for row in (report.posterior, report.prior)]
    figures = {}
    if any(one.metrics or one.last for one in series) or any(references):
        figures["reward_against_kl"] = tradeoff_figure(
            series, report.reward_label, report.reward_is_share, *references
        )
    if any(one.metrics for one in series):
        figures["learning_curves"] = learning_curves_figure(series, _panels(report, references[0]))
    return figures


def _panels(report: Report, posterior: dict[str, Estimate]) -> list[Panel]:
    nats = "nats"
    reverse = (
        ("reverse_kl_inside", "KL(π‖p), inside the posterior's support") if report.hard else ("reverse_kl", "KL(π‖p)")
    )
    return [
        Panel("forward_kl", "KL(p‖π): what is missed", nats, posterior.get("forward_kl"), is_distance=True),
        Panel(*reverse, nats, posterior.get(reverse[0]), is_distance=True),
        Panel("entropy", "Entropy of the policy", nats, posterior.get("entropy")),
        Panel(
            "reward",
            report.reward_label[:1].upper() + report.reward_label[1:],
            "share" if report.reward_is_share else "reward",
            posterior.get("reward"),
            is_share=report.reward_is_share,
        ),
    ]


def render(report: Report, figures: Sequence[Mapping[str, bytes]]) -> str:
    """The page as text; figures are PNG files by name, for the report and each of its parts."""
    environment = Environment(
        loader=PackageLoader("trl_bayes.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=_visible, setting=_setting)
    parts = [_part(*pair) for pair in zip([report, *report.parts], figures, strict=True)]
    return environment.get_template("report.html.j2").render(title=report.title, parts=parts)


def _split_settings(settings: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """Names of what differs between runs, and what is the same in all of them."""
    own: list[str] = []
    shared: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in settings for name in each):
        first, *others = (each.get(name) for each in settings)
        if all(value == first for value in others):
            shared[name] = first
        else:
            own.append(name)
    return own, shared


def _part(report: Report, figures: Mapping[str, bytes]) -> dict[str, Any]:
    """What the page shows of one problem."""
    with_settings = [run for run in report.runs if run.settings or run.seconds is not None]
    own, shared = _split_settings([run.settings for run in with_settings])
    return {
        "report": report,
        "has_close_up": has_close_up([_series(run) for run in report.runs], _reference_metrics(report.posterior)),
        "figures": {name: base64.b64encode(png).decode("ascii") for name, png in figures.items()},
        "distances": tabulate(distance_columns(report), report.rows),
        "rewards": tabulate(reward_columns(report), report.rows),
        "diversity": tabulate(DIVERSITY_COLUMNS, report.rows),
        "has_curves": any(run.curve for run in report.runs),
        "has_marks": any(line.valid is not None for row in report.rows for line in row.samples),
        "with_samples": [row for row in report.rows if row.samples],
        "with_settings": with_settings,
        "own_settings": own,
        "shared_settings": shared | report.settings,
        "sample_sizes": [row for row in report.rows if row.evaluation is not None],
    }


def write_report(report: Report, folder: str | Path) -> Path:
    """
    Writes `report.html`, `report.json` and `figures/*.png`.

    Args:
        report ([`Report`]): what to show. Any number may be missing or infinite.
        folder (`str` or `Path`): made if it is not there.

    Returns:
        The path of the page.
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    figures = [_figures(part) for part in [report, *report.parts]]
    for number, of_part in enumerate(figures, start=1):
        for name, png in of_part.items():
            suffix = "" if number == 1 else f"_{number}"
            (folder / "figures" / f"{name}{suffix}.png").write_bytes(png)
    write_json(report, folder / REPORT)
    page = folder / "report.html"
    page.write_text(render(report, figures), encoding="utf-8", errors="replace")  # a model may write half characters
    return page


def _visible(text: str) -> str:
    """A text on one line: line ends and other control characters as their pictures."""
    pictures = {**{code: chr(0x2400 + code) for code in range(32)}, ord("\n"): "⏎", ord("\t"): "⇥"}
    return text.translate(pictures)


def _setting(value: Any) -> str:
    """A setting as text; one with parts as JSON."""
    if value is None:
        return "–"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(strict_json(value), ensure_ascii=False)
    return str(value)
