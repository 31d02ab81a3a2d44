"""What a figure of a paper is made of: a script in `recipes/papers/`, what it is told, and what it has found.

A script has a function `experiment(setting)` that returns [`Shown`]. `trl-bayes bench papers` runs it and writes the
files; what scripts need in common is here, and everything else is the package's public interface.
"""

import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..assets import shipped_file
from .jobs import in_order
from .tiny import EnumerableTask


T = TypeVar("T")
SCRIPT = "experiment.py"


class Shown(NamedTuple):
    """What an experiment has found."""

    record: Any
    """Strict JSON, with every number."""
    markdown: str
    """Tables, without a heading."""
    figure: bytes
    """A PNG file."""


@dataclass(frozen=True)
class Setting:
    """
    What an experiment is told.

    Args:
        seeds (`tuple[int, ...]`): of priors, of noise and of trainings, whatever its spread comes from.
        quick (`bool`): try everything and measure nothing well.
        num_parallel (`int`): trainings at the same time.
        progress ([`~rich.progress.Progress`]): gets a bar for trainings.
        script (`Path`): the experiment's own file.
    """

    seeds: tuple[int, ...]
    quick: bool
    num_parallel: int
    progress: Progress
    script: Path

    def run(self, function: Callable[..., T], arguments: Sequence[Mapping[str, Any]]) -> list[T]:
        """
        Calls a function of the script for each of the arguments, in one process or several; results in their order.

        Args:
            function (`Callable`): a function of the script, known there by its name; what it returns is pickled.
            arguments (`list[dict]`): keyword arguments of each call.
        """
        jobs = [partial(call, self.script, function.__name__, dict(each)) for each in arguments]
        results: list[T] = []
        for found in in_order(jobs, self.num_parallel, self.progress, self.script.parent.name):
            results = found
        return results


def scripts() -> dict[str, Path]:
    """The experiments by the names of their folders."""
    return {path.parent.name: path for path in sorted(shipped_file("recipes/papers").glob(f"*/{SCRIPT}"))}


def load(script: Path) -> ModuleType:
    """The script as a module, once a process; processes that are started by one find it by its file."""
    name = f"trl_bayes_papers_{script.parent.name}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, script)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # pickle looks for a class of the script here
        spec.loader.exec_module(module)
    return sys.modules[name]


def call(script: Path, function: str, arguments: Mapping[str, Any]) -> Any:
    """Calls a function of a script."""
    return getattr(load(script), function)(**arguments)


class Enumerated(NamedTuple):
    """A task of which everything is known."""

    log_prior: torch.Tensor
    """`(P, N)`, in nats."""
    rewards: torch.Tensor
    """`(N,)`, float64."""


def enumerated(task: EnumerableTask) -> Enumerated:
    """Makes the prior of a task and scores all its completions."""
    with tempfile.TemporaryDirectory() as folder:
        path = task.build_model(folder)
        tokenizer = AutoTokenizer.from_pretrained(path)
        log_prior = task.log_probs(AutoModelForCausalLM.from_pretrained(path), tokenizer)
    return Enumerated(log_prior, task.rewards(tokenizer))


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """`mean ± standard deviation` over seeds, as text."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"
