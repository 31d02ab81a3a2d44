"""The recorder: where it measures, and that its seconds are those of training alone."""

from types import SimpleNamespace
from typing import Any, cast

from trl_bayes.benchmarks.learning_curve import Point, Recorder, log_spaced


def test_steps_are_spaced_by_ratios() -> None:
    assert log_spaced(64, 7) == [0, 1, 2, 4, 8, 16, 32, 64]
    assert log_spaced(640, 3, first_share=1 / 64) == [0, 10, 80, 640]
    assert log_spaced(1) == [0, 1] and log_spaced(2) == [0, 1, 2]


def test_measures_at_its_steps_and_leaves_out_its_own_time() -> None:
    """On a clock that is set by hand: a step takes 3, a measurement 100."""
    state = SimpleNamespace(global_step=0)
    now = 1000.0
    numbers = iter(range(10))

    def measure() -> int:
        nonlocal now
        now += 100
        return next(numbers)

    recorder = Recorder(measure, [0, 2], samples_per_step=2.5, clock=lambda: now)
    recorder.on_train_begin(*cast(Any, (None, state, None)))
    for state.global_step in (1, 2, 3):
        now += 3
        recorder.on_step_end(*cast(Any, (None, state, None)))
    assert recorder.points == [Point(0, 0.0, 0), Point(5, 6.0, 1)]
    assert recorder.seconds == 9.0 and now == 1209.0
