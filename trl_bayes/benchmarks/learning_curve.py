"""How close a policy is while it trains, against completions drawn and against seconds."""

import time
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


T = TypeVar("T")


class Point(NamedTuple, Generic[T]):
    """A measurement after some completions were drawn; `seconds` of training, without those of measuring."""

    samples: int
    seconds: float
    value: T


class Recorder(TrainerCallback, Generic[T]):
    """
    Measures the policy after some steps.

    Args:
        measure (`Callable`): gives the measurement of the policy as it is.
        steps (`Iterable[int]`): after which to measure; 0 is before the first.
        samples_per_step (`float`): completions drawn for a step.
        clock (`Callable`, *optional*): seconds since whenever.
    """

    def __init__(
        self,
        measure: Callable[[], T],
        steps: Iterable[int],
        samples_per_step: float,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.measure = measure
        self.steps = set(steps)
        self.samples_per_step = samples_per_step
        self.clock = clock
        self.points: list[Point[T]] = []
        self._start = self._measuring = 0.0

    @property
    def seconds(self) -> float:
        """Since training began, without the time that measuring took."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return self.clock() - self._start - self._measuring

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._start = self.clock()
        self._record(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._record(state.global_step)

    def _record(self, step: int) -> None:
        if step not in self.steps:
            return
        seconds, start = self.seconds, self.clock()
        self.points.append(Point(round(step * self.samples_per_step), seconds, self.measure()))
        self._measuring += self.clock() - start


class Course(NamedTuple, Generic[T]):
    """A training that is over: completions drawn, seconds without those of measuring, and what was measured."""

    samples: int
    seconds: float
    curve: tuple[Point[T], ...]


def train_recorded(trainer: Any, measure: Callable[[], T], steps: Iterable[int]) -> Course[T]:
    """
    Trains in silence.

    Args:
        trainer ([`~trl.GRPOTrainer`]): or one with its arguments, such as RLOOTrainer.
        measure (`Callable`), steps (`Iterable[int]`): as of [`Recorder`].
    """
    per_step = trainer.args.per_device_train_batch_size / trainer.args.num_iterations
    recorder = Recorder(measure, steps, per_step)
    trainer.add_callback(recorder)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Course(round(trainer.args.max_steps * per_step), recorder.seconds, tuple(recorder.points))


def log_spaced(last: int, number: int = 8, first_share: float = 1 / 64) -> list[int]:
    """
    Steps at equal ratios, and 0.

    Args:
        last (`int`): the largest.
        number (`int`, *optional*, defaults to `8`): how many besides 0, at least 2; fewer where some would be equal.
        first_share (`float`, *optional*, defaults to `1/64`): the smallest one's share of the largest.
    """
    ratios = [first_share ** (1 - place / (number - 1)) for place in range(number)]
    return sorted({0, last, *(max(1, round(last * ratio)) for ratio in ratios)})
