"""How close a policy is while it trains, against completions drawn and against seconds."""

import time
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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
    """

    def __init__(self, measure: Callable[[], T], steps: Iterable[int], samples_per_step: float):
        self.measure = measure
        self.steps = set(steps)
        self.samples_per_step = samples_per_step
        self.points: list[Point[T]] = []
        self._start = self._measuring = 0.0

    @property
    def seconds(self) -> float:
        """Since training began, without the time that measuring took."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() - self._start - self._measuring

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._start = time.perf_counter()
        self._record(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._record(state.global_step)

    def _record(self, step: int) -> None:
        if step not in self.steps:
            return
        seconds, start = self.seconds, time.perf_counter()
        self.points.append(Point(round(step * self.samples_per_step), seconds, self.measure()))
        self._measuring += time.perf_counter() - start


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
