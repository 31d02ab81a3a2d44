"""Many trainings, in this process or in several, with their results in order as they come."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

import torch
import transformers
from rich.progress import Progress


T = TypeVar("T")


def in_order(
    jobs: Sequence[Callable[[], T]], num_parallel: int, progress: Progress, description: str
) -> Iterator[list[T]]:
    """
    Runs the jobs, and yields all results so far, in the order of the jobs, whenever there is another.

    Args:
        jobs (`list[Callable]`): to be pickled if there are several processes.
        num_parallel (`int`): processes, each with one CPU thread; with 1 all run in this process.
        progress ([`~rich.progress.Progress`]): gets a bar.
        description (`str`): of the bar.
    """
    bar = progress.add_task(description, total=len(jobs))
    done: dict[int, T] = {}
    for number, result in _run(jobs, num_parallel):
        done[number] = result
        progress.advance(bar)
        yield [done[place] for place in sorted(done)]


def _run(jobs: Sequence[Callable[[], T]], num_parallel: int) -> Iterator[tuple[int, T]]:
    """The results with the numbers of their jobs, as they come."""
    if num_parallel == 1 or len(jobs) < 2:
        quiet()
        for number, job in enumerate(jobs):
            yield number, job()
        return
    with ProcessPoolExecutor(num_parallel, mp_context=get_context("spawn"), initializer=quiet) as pool:
        numbers = {pool.submit(job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupted benchmark does not start the rest


def quiet() -> None:
    """One thread, since the models are tiny and more would wait for one another; and no output but our own bars."""
    torch.set_num_threads(1)
    # TRL calls methods of transformers by the names that they had before
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
