"""What is known of a set of runs: where they ended, how they got there, and what their samples look like.

A [`Report`] is written as JSON and read again ([`trl_bayes.evaluation.files`]), put on one page with others
([`trl_bayes.evaluation.page`]), or shown as tables ([`trl_bayes.evaluation.tables`]).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from ..language_models.completions import Completions, Prompt
from ..statistics.estimate import Estimate
from ..statistics.strict_json import strict_json
from .evaluate import Evaluation


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
    metrics: dict[str, Estimate]


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
        """Strict JSON: see [`~trl_bayes.statistics.estimate.Estimate.to_dict`]."""
        record = {**vars(self), "runs": [_run_to_dict(run) for run in self.runs]}
        record["parts"] = [part.to_dict() for part in self.parts]
        for name in ("posterior", "prior"):
            record[name] = None if record[name] is None else _run_to_dict(record[name])
        return strict_json(record)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Report":
        """What [`~Report.to_dict`] wrote."""
        references = {
            name: None if record.get(name) is None else _run_from_dict(record[name]) for name in ("posterior", "prior")
        }
        runs = [_run_from_dict(run) for run in record.get("runs", [])]
        parts = [cls.from_dict(part) for part in record.get("parts", [])]
        return cls(**{**record, **references, "runs": runs, "parts": parts})


def _run_to_dict(run: RunRecord) -> dict[str, Any]:
    return {
        **vars(run),
        "evaluation": None if run.evaluation is None else run.evaluation.to_dict(),
        "curve": [
            {**vars(point), "metrics": {name: value.to_dict() for name, value in point.metrics.items()}}
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


def choose_lines(completions: Completions, valid: Tensor | None = None, number: int = 20) -> list[SampleLine]:
    """The first samples of each prompt, about as many of each: not chosen by their looks.

    Args:
        completions ([`~trl_bayes.language_models.completions.Completions`]): in any order.
        valid (`torch.Tensor`, *optional*): (N,) whether each has the evidence, such as `rewards[:, 0] > 0.5`.
        number (`int`, *optional*, defaults to `20`): of lines, at most.
    """
    by_prompt: list[list[int]] = [[] for _ in completions.prompts]
    for i, prompt in enumerate(completions.prompt_index.tolist()):
        by_prompt[prompt].append(i)
    longest = max((len(indices) for indices in by_prompt), default=0)
    in_turn = [indices[turn] for turn in range(longest) for indices in by_prompt if turn < len(indices)][:number]
    chosen = sorted(in_turn, key=lambda i: int(completions.prompt_index[i]))
    return [
        SampleLine(
            _prompt_text(completions.prompts[int(completions.prompt_index[i])]),
            completions.texts[i],
            None if valid is None else bool(valid[i]),
        )
        for i in chosen
    ]


def _prompt_text(prompt: Prompt) -> str:
    """A text as it is; of messages, what the last one says."""
    return prompt if isinstance(prompt, str) else f"{prompt[-1].get('content', '')} → "
