"""Trainers side by side: a trainer with its settings, where a run of it ended, and what sections of them share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from transformers import TrainingArguments
from trl import GRPOTrainer, RLOOTrainer

from .figure import Curve, TrainingCurves
from .learning_curve import Point
from .section import DeviceArguments


V = TypeVar("V")
F = TypeVar("F")

# The benchmarks have a bar of their own, and keep what they measure themselves
SILENT: dict[str, Any] = {
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class TrainerSetup:
    """A trainer with its configuration, as one row of a table."""

    name: str
    trainer: Callable[..., GRPOTrainer | RLOOTrainer]
    config: Callable[..., TrainingArguments]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether the trainer has a posterior of its own choice."""
        return self.trainer not in (GRPOTrainer, RLOOTrainer)

    @property
    def takes_target(self) -> bool:
        """Whether the trainer takes a `target`: ours do, unless they make it from their configuration."""
        return self.is_ours and not getattr(self.trainer, "makes_target", False)  # a function makes none


@dataclass(frozen=True)
class TrainingRun(Generic[V, F]):
    """Where a run ended, after how many generated samples and seconds of training; `curve` is its way there."""

    problem: str
    method: str
    seed: int
    samples: int
    seconds: float
    final: F
    curve: tuple[Point[V], ...] = ()

    def to_record(
        self, final_name: str, final_record: Callable[[F], Any], point_record: Callable[[V], dict[str, Any]]
    ) -> dict[str, Any]:
        """As JSON, if that is what the two functions give; the end is put under `final_name`."""
        about = {name: getattr(self, name) for name in ("problem", "method", "seed", "samples", "seconds")}
        points = [{"samples": at.samples, "seconds": at.seconds, **point_record(at.value)} for at in self.curve]
        return {**about, final_name: final_record(self.final), "curve": points}


def curves_of(runs: Sequence[TrainingRun[V, Any]], value: Callable[[V], float], start: float) -> TrainingCurves:
    """
    A row of the figure.

    Args:
        runs (`list[TrainingRun]`): of one problem.
        value (`Callable`): a divergence from what was measured.
        start (`float`): the prior's own.
    """
    curves = [
        Curve(
            run.method,
            [point.samples for point in run.curve],
            [point.seconds for point in run.curve],
            [value(point.value) for point in run.curve],
        )
        for run in runs
    ]
    return TrainingCurves(runs[0].problem, curves, start)


def chosen(setups: Iterable[TrainerSetup], parts: Sequence[str]) -> list[TrainerSetup]:
    """The trainers whose name has one of the parts; all if there are no parts."""
    return [setup for setup in setups if not parts or any(part in setup.name for part in parts)]


def check_parts(setups: Iterable[TrainerSetup], parts: Iterable[str]) -> None:
    """
    Checks that each part finds a trainer.

    Raises:
        ValueError: one finds none; one sentence.
    """
    names = list(dict.fromkeys(setup.name for setup in setups))
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(f"`methods`: no trainer's name has {part!r} in it: they are {', '.join(names)}.")


@dataclass
class TrainingsArguments(DeviceArguments):
    r"""
    Arguments of a section that trains, besides those of [`~trl_bayes.benchmarks.section.DeviceArguments`].

    Parameters:
        methods (`list[str]`, *optional*): parts of the names of the trainers to run; all by default.
        seeds (`list[int]`, *optional*, defaults to `[0, 1]`): seeds of the trainings.
        samples (`int`, *optional*): completions that each training draws, at most as many as its problem's own budget.
        num_parallel (`int`, *optional*, defaults to `2`): trainings at the same time, each in a process with one CPU
            thread; with 1 they run in this process.
        quick (`bool`, *optional*, defaults to `False`): try everything and measure nothing well.
    """

    methods: list[str] = field(default_factory=list, metadata={"help": "Parts of the names of the trainers to run."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Seeds of the trainings."})
    samples: int | None = field(
        default=None,
        metadata={
            "help": "Completions that each training draws, at most as many as its problem's own budget. Defaults to "
            "20480 on exact tasks and 4000 on the embedded prior."
        },
    )
    num_parallel: int = field(default=2, metadata={"help": "Trainings at the same time, each on one CPU thread."})
    quick: bool = field(default=False, metadata={"help": "Try everything in a minute, and measure nothing well."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"`samples={self.samples}` trains nothing: set it to 1 or more.")
        if self.num_parallel < 1:
            raise ValueError(f"`num_parallel={self.num_parallel}` trains nothing: set it to 1 or more.")
        if any(not 0 <= seed < 2**32 - 1 for seed in self.seeds):
            raise ValueError(f"`seeds` must be between 0 and 2^32 - 2, got {self.seeds}.")
        self.seeds = list(dict.fromkeys(self.seeds))

    def how(self) -> str:
        """How the trainings were run, for the text above a table."""
        seeds = f"seed{'s' if len(self.seeds) > 1 else ''} {', '.join(map(str, self.seeds))}"
        at_once = f", {self.num_parallel} trainings at a time, one CPU thread each" if self.num_parallel > 1 else ""
        return f"{seeds}; on {'the CPU' if self.use_cpu else 'the GPU'}{at_once}"
