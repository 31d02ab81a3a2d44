"""One HTML page for a set of runs: what they reached, how they got there, and what their samples look like.

The page is a single file with its figures inside; it loads nothing and runs no script. Beside it lie the figures as
PNG and `report.json`, from which the same page can be made again ([`read_report`]), alone or with other runs.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .evaluate import Estimate, Evaluation
from .figures import Panel, Series, has_close_up, learning_curves_figure, tradeoff_figure


if TYPE_CHECKING:
    from torch import Tensor

    from ..language_models.samples import Samples


Number = Estimate | float | None

EVALUATION = "evaluation.json"
TRAINER_STATE = "trainer_state.json"  # what Hugging Face's trainers write


@dataclass(frozen=True)
class SampleLine:
    """A completion after its prompt; `valid` says whether it has the evidence, None where that is no question."""

    prompt: str
    completion: str
    valid: bool | None = None


@dataclass(frozen=True)
class CurvePoint:
    """Metrics of a checkpoint, after `step` updates and `samples` completions drawn in training."""

    step: int
    samples: int
    metrics: dict[str, Number]


@dataclass
class RunRecord:
    """
    One row of the report: a run, or a reference.

    Args:
        name (`str`): short and unique.
        label (`str`): for tables and legends.
        target (`str`, *optional*): what it was trained towards, in words.
        evaluation ([`~trl_bayes.evaluation.evaluate.Evaluation`], *optional*): where it ended.
        curve (`list[CurvePoint]`, *optional*): how it got there.
        samples (`list[SampleLine]`, *optional*): see [`choose_lines`].
        settings (`dict`, *optional*): what it was run with.
        seconds (`float`, *optional*): what it took.
    """

    name: str
    label: str
    target: str = ""
    evaluation: Evaluation | None = None
    curve: list[CurvePoint] = field(default_factory=list)
    samples: list[SampleLine] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    def metric(self, name: str) -> Estimate | None:
        """An estimate of the evaluation; None where there is none."""
        return self.evaluation.metrics.get(name) if self.evaluation is not None else None


@dataclass
class Report:
    """
    What the page shows.

    Args:
        title (`str`): of the page.
        intro (`str`): what was done, in about three sentences, for a reader of the README.
        problem (`dict[str, str]`, *optional*): the task in a few pairs of name and value.
        posterior, prior ([`RunRecord`], *optional*): the references.
        runs (`list[RunRecord]`, *optional*): the runs.
        hard (`bool`, *optional*, defaults to `False`): whether the posterior excludes some completions.
        reward_label (`str`, *optional*, defaults to `"mean reward"`): what the reward is.
        reward_is_share (`bool`, *optional*, defaults to `False`): whether it is a share, shown in per cent.
        valid_label, invalid_label (`str`, *optional*): what a sample with, or without, the evidence is called.
        settings (`dict`, *optional*): seeds, versions, seconds: what all runs share.
        parts (`list[Report]`, *optional*): reports about other problems, which follow on the same page.
    """

    title: str
    intro: str
    problem: dict[str, str] = field(default_factory=dict)
    posterior: RunRecord | None = None
    prior: RunRecord | None = None
    runs: list[RunRecord] = field(default_factory=list)
    hard: bool = False
    reward_label: str = "mean reward"
    reward_is_share: bool = False
    valid_label: str = "valid"
    invalid_label: str = "not valid"
    settings: dict[str, Any] = field(default_factory=dict)
    parts: list["Report"] = field(default_factory=list)

    @property
    def rows(self) -> list[RunRecord]:
        """References and runs."""
        return [row for row in (self.posterior, self.prior, *self.runs) if row is not None]

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: see [`~trl_bayes.evaluation.evaluate.Estimate.to_dict`]."""
        record = {**vars(self), "runs": [_run_to_dict(run) for run in self.runs]}
        record["parts"] = [part.to_dict() for part in self.parts]
        for name in ("posterior", "prior"):
            record[name] = None if record[name] is None else _run_to_dict(record[name])
        return _strict(record)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Report":
        """What [`~Report.to_dict`] wrote."""
        references = {
            name: None if record.get(name) is None else _run_from_dict(record[name]) for name in ("posterior", "prior")
        }
        runs = [_run_from_dict(run) for run in record.get("runs", [])]
        parts = [cls.from_dict(part) for part in record.get("parts", [])]
        return cls(**{**record, **references, "runs": runs, "parts": parts})


def _estimate(value: Number) -> Estimate:
    if isinstance(value, Estimate):
        return value
    return Estimate(math.nan, trusted=False, note="not measured") if value is None else Estimate(float(value))


def _run_to_dict(run: RunRecord) -> dict[str, Any]:
    return {
        **vars(run),
        "evaluation": None if run.evaluation is None else run.evaluation.to_dict(),
        "curve": [
            {**vars(point), "metrics": {name: _estimate(value).to_dict() for name, value in point.metrics.items()}}
            for point in run.curve
        ],
        "samples": [asdict(line) for line in run.samples],
    }


def _run_from_dict(record: Mapping[str, Any]) -> RunRecord:
    evaluation = record.get("evaluation")
    curve = [
        replace(
            CurvePoint(**point),
            metrics={name: Estimate.from_dict(value) for name, value in point["metrics"].items()},
        )
        for point in record.get("curve", [])
    ]
    return RunRecord(
        **{
            **record,
            "evaluation": None if evaluation is None else Evaluation.from_dict(evaluation),
            "curve": curve,
            "samples": [SampleLine(**line) for line in record.get("samples", [])],
        }
    )


def _strict(value: Any) -> Any:
    """JSON without NaN and infinity, which settings may hold too; what JSON does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def choose_lines(samples: "Samples", valid: "Tensor | None" = None, number: int = 20) -> list[SampleLine]:
    """The first samples of each prompt, about as many of each: not chosen by their looks.

    Args:
        samples ([`~trl_bayes.language_models.samples.Samples`]): in any order.
        valid (`torch.Tensor`, *optional*): (N,) whether each has the evidence, such as `rewards[:, 0] > 0.5`.
        number (`int`, *optional*, defaults to `20`): of lines, at most.
    """
    by_prompt: list[list[int]] = [[] for _ in samples.prompts]
    for i, prompt in enumerate(samples.prompt_index.tolist()):
        by_prompt[prompt].append(i)
    longest = max((len(indices) for indices in by_prompt), default=0)
    in_turn = [indices[turn] for turn in range(longest) for indices in by_prompt if turn < len(indices)][:number]
    chosen = sorted(in_turn, key=lambda i: int(samples.prompt_index[i]))
    return [
        SampleLine(
            _prompt_text(samples.prompts[int(samples.prompt_index[i])]),
            samples.texts[i],
            None if valid is None else bool(valid[i]),
        )
        for i in chosen
    ]


def _prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """A text as it is; of messages, what the last one says."""
    return prompt if isinstance(prompt, str) else f"{prompt[-1].get('content', '')} → "


def _visible(text: str) -> str:
    """A text on one line: line ends and other control characters as their pictures."""
    pictures = {**{code: chr(0x2400 + code) for code in range(32)}, ord("\n"): "⏎", ord("\t"): "⇥"}
    return text.translate(pictures)


def _setting(value: Any) -> str:
    """A setting as text; one with parts as JSON."""
    if value is None:
        return "–"
    return json.dumps(_strict(value), ensure_ascii=False) if isinstance(value, Mapping | list | tuple) else str(value)


# --- numbers as text -----------------------------------------------------------------------------------------------


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


def distance_columns(report: Report) -> list[Column]:
    """The reward, distances and entropy; with a hard target, KL(π‖p) inside its support in place of an infinity."""
    inside = [
        Column(
            "reverse_kl_inside",
            "KL(π‖p) inside",
            "The same the other way round, for the part of π that p allows: does the policy prefer some completions "
            "over others more than p does? Zero if it does not. Over all of π it would be infinite, because p forbids "
            "some completions that π still produces.",
        ),
        Column(
            "mass_outside",
            "forbidden",
            "The share of the policy's completions that the posterior never produces. Zero is the goal.",
            percent=True,
        ),
    ]
    reverse = [
        Column(
            "reverse_kl",
            "KL(π‖p)",
            "The same the other way round: does the policy produce what the posterior does not? Zero if π is p. This "
            "is what RL with a KL penalty minimizes.",
        )
    ]
    return [
        Column("reward", report.reward_label, "The reward, averaged over completions.", report.reward_is_share),
        Column(
            "kl_prior",
            "KL(π‖π₀)",
            "How far the policy has moved from the prior. The posterior moves as far as the evidence requires; "
            "farther is a loss of what the prior knew.",
        ),
        Column(
            "forward_kl",
            "KL(p‖π)",
            "Does the policy still produce everything that the posterior produces? Zero if π is p; large if it has "
            "dropped some of it, as a collapsed policy has.",
        ),
        *(inside if report.hard else reverse),
        Column(
            "total_variation",
            "TV(π, p)",
            "The largest difference in probability that π and p give to any event: 0 if they are the same, 1 if they "
            "have nothing in common.",
        ),
        Column(
            "entropy",
            "entropy",
            "How unpredictable a completion is. A policy that always says the same has entropy 0.",
        ),
    ]


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


# --- the page ------------------------------------------------------------------------------------------------------


def _series(run: RunRecord) -> Series:
    points = sorted(run.curve, key=lambda point: point.samples)
    metrics = [{name: _estimate(value) for name, value in point.metrics.items()} for point in points]
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
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(render(report, figures), encoding="utf-8", errors="replace")  # a model may write half characters
    return page


def write_evaluation(report: Report, folder: str | Path) -> Path:
    """
    Writes `evaluation.json`: every estimate of every row, for programs, and all that a page needs ([`read_report`]).

    Args:
        report ([`Report`]): its rows are the models that were evaluated.
        folder (`str` or `Path`): of a finished preparation.

    Returns:
        The path of the file.
    """
    file = Path(folder) / EVALUATION
    file.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return file


def read_report(path: str | Path) -> Report:
    """
    What is known of a run: a report of [`write_report`], an evaluation of [`write_evaluation`], or a training's log.

    Args:
        path (`str` or `Path`): a folder with one of these, or the file itself.

    Raises:
        ValueError: there is none, or the file is something else.
    """
    path = Path(path)
    if path.is_dir():
        known = [path / name for name in (EVALUATION, "report.json", TRAINER_STATE) if (path / name).exists()]
        path = known[0] if known else path / "report.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return _training_log(path, record) if path.name == TRAINER_STATE else Report.from_dict(record)
    except OSError:
        raise ValueError(f"There is no report at {path}: give the folder of a finished run.") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is not a report written by `trl_bayes`.") from None


_LOGGED = {"reward": "reward", "posterior/kl_prior": "kl_prior", "posterior/forward_kl": "forward_kl"}


def _training_log(path: Path, state: Mapping[str, Any]) -> Report:
    """A run that was not evaluated: what its trainer logged, in `trainer_state.json`. Its problem is not known."""
    name, log = path.resolve().parent.name, state["log_history"]
    end: dict[str, Any] = next((entry for entry in reversed(log) if "train_runtime" in entry), {})
    per_step = end.get("train_samples_per_second", 0) * end.get("train_runtime", 0) / max(state["global_step"], 1)
    note = "as logged in training, without a standard error"
    curve = [
        CurvePoint(
            entry["step"],
            round(entry["step"] * per_step),
            {ours: Estimate(float(entry[key]), note=note) for key, ours in _LOGGED.items() if key in entry},
        )
        for entry in log
        if "reward" in entry
    ]
    if not curve:
        raise ValueError("nothing of ours is in this log")
    last = Evaluation(name, {key: _estimate(value) for key, value in curve[-1].metrics.items()}, note=note)
    run = RunRecord(name, name, "", last, curve, settings={"steps": state["global_step"]})
    run.seconds = end.get("train_runtime")
    return Report(
        "Training runs", "What each run's trainer logged: estimates from the samples it trained on.", runs=[run]
    )


def merge_reports(reports: Mapping[str, Report]) -> Report:
    """
    All runs of several reports on one page: those about one problem together, with the references of the first.

    Args:
        reports (`dict[str, Report]`): by a name, such as their folders. Where there are several about a problem, it is
            added to the labels of the runs. One that does not say what its problem is, the log of a training, goes
            with the first.

    Raises:
        ValueError: no reports.
    """
    if not reports:
        raise ValueError("There are no reports to merge: give at least one.")
    every = {
        name if number == 0 else f"{name}, part {number + 1}": replace(part, parts=[])
        for name, report in reports.items()
        for number, part in enumerate([report, *report.parts])
    }
    groups: list[dict[str, Report]] = []
    for name, report in sorted(every.items(), key=lambda item: not item[1].problem):  # stable: logs come last
        same = [group for group in groups if not report.problem or _are_comparable(report, next(iter(group.values())))]
        if same:
            same[0][name] = report
        else:
            groups.append({name: report})
    first, *others = [_merge_comparable(group) for group in groups]
    return replace(first, parts=others)


def _are_comparable(one: Report, other: Report) -> bool:
    return all(getattr(one, what) == getattr(other, what) for what in ("problem", "hard", "reward_label"))


def _merge_comparable(reports: Mapping[str, Report]) -> Report:
    """The runs of reports about one problem, with the references and texts of the first."""
    first, *others = reports.values()
    if not others:
        return first
    runs = [
        replace(run, name=f"{name}/{run.name}", label=f"{run.label} ({name})")
        for name, report in reports.items()
        for run in report.runs
    ]
    settings = {f"{key} ({name})": value for name, report in reports.items() for key, value in report.settings.items()}
    return replace(first, runs=runs, settings=settings)
