"""Reports as files: written as JSON, read again, from a training's log too, and merged.

`report.json` lies beside a page and `evaluation.json` in the folder of an evaluation; from either the same page can be
made again, alone or with other runs.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..language_models.completions import Completions
from ..statistics.estimate import Estimate
from .evaluate import Evaluation
from .report import CurvePoint, Report, RunRecord


EVALUATION = "evaluation.json"
REPORT = "report.json"
TRAINER_STATE = "trainer_state.json"  # what Hugging Face's trainers write


def write_json(report: Report, file: Path) -> None:
    """Writes a report as strict JSON."""
    file.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


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
    write_json(report, file)
    return file


def write_samples(completions: Completions, folder: str | Path, name: str) -> Path:
    """
    Writes what a model said to `samples/NAME.jsonl`, a line a completion, see
    [`~trl_bayes.language_models.completions.Completions.to_dataset`].

    Args:
        completions ([`~trl_bayes.language_models.completions.Completions`]): of the model.
        folder (`str` or `Path`): of the evaluation.
        name (`str`): of the row.

    Returns:
        The path of the file.
    """
    file = Path(folder) / "samples" / f"{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    rows = completions.to_dataset().to_list()
    # Strict JSON has no infinity, which is phi of a completion that a hard target excludes
    lines = (json.dumps({k: None if v == -math.inf else v for k, v in row.items()}) for row in rows)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
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
        known = [path / name for name in (EVALUATION, REPORT, TRAINER_STATE) if (path / name).exists()]
        path = known[0] if known else path / REPORT
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
            {
                ours: Estimate(float(entry[key]), note=note)
                for key, ours in _LOGGED.items()
                if entry.get(key) is not None
            },
        )
        for entry in log
        if entry.get("reward") is not None  # of a step at which no completion had one there is nothing to show
    ]
    if not curve:
        raise ValueError("nothing of ours is in this log")
    last = Evaluation(name, curve[-1].metrics, note=note)
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
