"""The recorder: where it measures, and that its seconds are those of training alone."""

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from trl_bayes.benchmarks.learning_curve import Recorder, log_spaced


def test_steps_are_spaced_by_ratios() -> None:
    assert log_spaced(64, 7) == [0, 1, 2, 4, 8, 16, 32, 64]
    assert log_spaced(640, 3, first_share=1 / 64) == [0, 10, 80, 640]
    assert log_spaced(1) == [0, 1] and log_spaced(2) == [0, 1, 2]


def test_measures_at_its_steps_and_leaves_out_its_own_time() -> None:
    state = SimpleNamespace(global_step=0)
    numbers = iter(range(10))

    def measure() -> int:
        time.sleep(0.2)
        return next(numbers)

    recorder = Recorder(measure, [0, 2], samples_per_step=2.5)
    recorder.on_train_begin(*cast(Any, (None, state, None)))
    for state.global_step in (1, 2, 3):
        time.sleep(0.02)
        recorder.on_step_end(*cast(Any, (None, state, None)))
    assert [(point.samples, point.value) for point in recorder.points] == [(0, 0), (5, 1)]
    assert recorder.points[0].seconds < 0.04 <= recorder.points[1].seconds
    assert recorder.seconds == pytest.approx(0.06, abs=0.1)  # 0.46 with the measurements
