"""What is measured of steps: clocks, ratios, and sizes that are given or not."""

import pytest

from trl_bayes.benchmarks.timing import Clock, ProcessorClock, SizeArguments, StepSize, ratio_cells


def test_clocks_leave_out_the_first_two_steps() -> None:
    for clock in (Clock(), ProcessorClock()):
        clock.seconds = [9.0, 9.0, 1.0, 2.0, 4.0]
        assert clock.median == 2.0


def test_ratios_are_those_of_a_round() -> None:
    assert ratio_cells([2.0, 6.0, 8.0], [1.0, 2.0, 8.0], digits=1) == ["6.0", "2.000 (1.000 to 3.000)"]


def test_what_is_not_given_is_as_otherwise() -> None:
    given = SizeArguments(hidden_size=128, bf16=False).given_size(StepSize(num_layers=7, bf16=True, use_cpu=True))
    assert given == StepSize(hidden_size=128, num_layers=7, bf16=False, use_cpu=True)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0."),
        ({"hidden_size": 100}, "`hidden_size=100` must be a multiple of 64"),
        ({"batch_size": 9}, "`batch_size=9` must be a multiple of `num_generations=8`."),
        ({"vocab_size": 10}, "`vocab_size=10` is too small"),
    ],
)
def test_sizes_refused(size: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SizeArguments(**size).given_size(StepSize())  # type: ignore[arg-type]
