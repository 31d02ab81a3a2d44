"""Estimates as text: a table of metrics for each model, with what each metric is called and means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..statistics.estimate import Estimate
from .report import Report, RunRecord


def format_number(value: float, standard_error: float = math.nan, percent: bool = False) -> str:
    """A number with its standard error, as many digits as the error justifies: `0.731 ± 0.012`."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    factor, unit = (100, " %") if percent else (1, "")
    value, standard_error = value * factor, standard_error * factor
    most = 4 if percent else 6  # digits after the point; an error below them is not worth showing
    if not math.isfinite(standard_error) or standard_error < 0.5 * 10**-most:
        return f"{value:.3g}{unit}".replace("-", "−")
    digits = min(most, max(0, 1 - math.floor(math.log10(standard_error))))
    return f"{value:.{digits}f} ± {standard_error:.{digits}f}{unit}".replace("-", "−")


@dataclass(frozen=True)
class Column:
    """A metric of an evaluation, what it is called and what it means."""

    metric: str
    heading: str
    meaning: str
    percent: bool = False


@dataclass(frozen=True)
class Cell:
    """An estimate as text; what cannot be trusted is not printed as a number."""

    text: str
    footnote: int | None = None
    trusted: bool = True


@dataclass(frozen=True)
class MetricTable:
    """Rows of a label and cells, with footnotes that say what is special about a number."""

    columns: list[Column]
    rows: list[tuple[RunRecord, list[Cell]]]
    footnotes: list[str]


def tabulate(columns: Sequence[Column], rows: Sequence[RunRecord]) -> MetricTable:
    """The columns that some row has an estimate for."""
    shown = [column for column in columns if any(row.metric(column.metric) is not None for row in rows)]
    footnotes: list[str] = []

    def cell(estimate: Estimate | None, percent: bool) -> Cell:
        if estimate is None:
            return Cell("–")
        if estimate.note == "by definition":
            return Cell(format_number(estimate.value, percent=percent))
        if estimate.note and estimate.note not in footnotes:
            footnotes.append(estimate.note)
        footnote = footnotes.index(estimate.note) + 1 if estimate.note else None
        if not estimate.trusted:
            return Cell("not reliable", footnote, trusted=False)
        return Cell(format_number(estimate.value, estimate.standard_error, percent), footnote)

    cells = [(row, [cell(row.metric(column.metric), column.percent) for column in shown]) for row in rows]
    return MetricTable(shown, cells, footnotes)


_KL_PRIOR = Column(
    "kl_prior",
    "KL(π‖π₀)",
    "How far the policy has moved from the prior. The posterior moves as far as the evidence requires; "
    "farther is a loss of what the prior knew.",
)
_FORWARD_KL = Column(
    "forward_kl",
    "KL(p‖π)",
    "Does the policy still produce everything that the posterior produces? Zero if π is p; large if it has "
    "dropped some of it, as a collapsed policy has.",
)
_REVERSE_KL = Column(
    "reverse_kl",
    "KL(π‖p)",
    "The same the other way round: does the policy produce what the posterior does not? Zero if π is p. This "
    "is what RL with a KL penalty minimizes.",
)
_REVERSE_KL_INSIDE = Column(
    "reverse_kl_inside",
    "KL(π‖p) inside",
    "The same the other way round, for the part of π that p allows: does the policy prefer some completions "
    "over others more than p does? Zero if it does not. Over all of π it would be infinite, because p forbids "
    "some completions that π still produces.",
)
_MASS_OUTSIDE = Column(
    "mass_outside",
    "forbidden",
    "The share of the policy's completions that the posterior never produces. Zero is the goal.",
    percent=True,
)
_TOTAL_VARIATION = Column(
    "total_variation",
    "TV(π, p)",
    "The largest difference in probability that π and p give to any event: 0 if they are the same, 1 if they "
    "have nothing in common.",
)
_ENTROPY = Column(
    "entropy",
    "entropy",
    "How unpredictable a completion is. A policy that always says the same has entropy 0.",
)


def distance_columns(report: Report) -> list[Column]:
    """The reward, distances and entropy; with a hard target, KL(π‖p) inside its support in place of an infinity."""
    reward = Column("reward", report.reward_label, "The reward, averaged over completions.", report.reward_is_share)
    reverse = [_REVERSE_KL_INSIDE, _MASS_OUTSIDE] if report.hard else [_REVERSE_KL]
    return [reward, _KL_PRIOR, _FORWARD_KL, *reverse, _TOTAL_VARIATION, _ENTROPY]


def reward_columns(report: Report) -> list[Column]:
    """Each reward where there are several, and pass@k: in a table of their own, since they may be many."""
    names = list(dict.fromkeys(name for row in report.rows if row.evaluation for name in row.evaluation.metrics))
    columns = []
    for name in names:
        kind, _, reward = name.partition("/")
        if kind == "reward" and reward:
            columns.append(Column(name, reward, f"The reward {reward} alone, averaged over completions."))
        if kind.startswith("pass_at_"):
            k = kind.removeprefix("pass_at_")
            of = f" by {reward}" if reward else ""
            meaning = f"The probability that of {k} completions at least one is right{of}."
            columns.append(Column(name, f"pass@{k}{of}", meaning, percent=True))
    return columns


DIVERSITY_COLUMNS = [
    Column("distinct_1", "distinct-1", "Different tokens, as a share of all tokens."),
    Column("distinct_2", "distinct-2", "Different pairs of neighboring tokens, as a share of all pairs."),
    Column("distinct_3", "distinct-3", "Different triples of neighboring tokens, as a share of all triples."),
    Column(
        "self_bleu",
        "self-BLEU",
        "How much of a completion is found in the others: 1 if all are the same. The only one where low is varied.",
    ),
    Column("share_distinct", "distinct lines", "Different completions, as a share of all completions.", percent=True),
]
