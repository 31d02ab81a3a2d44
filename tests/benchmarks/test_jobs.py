"""Results come in the order of the jobs, whichever is ready first, and as many as there are so far."""

import os
from functools import partial

import pytest
from rich.progress import Progress

from trl_bayes.benchmarks.jobs import in_order


def test_in_this_process() -> None:
    with Progress(disable=True) as progress:
        found = list(in_order([partial(int, "4"), os.getpid, partial(int, "6")], 1, progress, "jobs"))
        assert found == [[4], [4, os.getpid()], [4, os.getpid(), 6]]
        assert progress.tasks[0].completed == progress.tasks[0].total == 3
        assert list(in_order([], 2, progress, "none")) == []


@pytest.mark.slow
def test_in_several_processes() -> None:
    with Progress(disable=True) as progress:
        *_, found = in_order([partial(int, "4"), os.getpid, partial(int, "6")], 2, progress, "jobs")
        assert found[0] == 4 and found[2] == 6 and found[1] != os.getpid()
        with pytest.raises(ValueError, match="invalid literal"):
            list(in_order([partial(int, "4"), partial(int, "x")], 2, progress, "jobs"))
