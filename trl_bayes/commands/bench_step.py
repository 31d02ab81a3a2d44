"""Measure step time and peak memory of each trainer, as ratios to RLOOTrainer's."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from transformers import HfArgumentParser

from ..benchmarks.exact_benchmark import methods, problems
from ..benchmarks.step_benchmark import Clock, StepSize, build_model, ratio_cells, train


YARDSTICK = "TRL RLOOTrainer"
Results = dict[str, list[dict[str, float]]]
_METHODS = {method.name: method for method in methods(problems()["letters"])}


@dataclass
class StepArguments(StepSize):
    r"""
    Arguments of the step benchmark, besides the [`~trl_bayes.benchmarks.step_benchmark.StepSize`].

    Each measurement is a process of its own, so peak memory is that of one trainer; rounds take the trainers in turn,
    so a slow spell of the machine falls on all of them.

    Parameters:
        rounds (`int`, *optional*, defaults to `5`): measurements of each trainer.
        methods (`list[str]`, *optional*): parts of the names of the trainers to measure beside RLOOTrainer.
        only (`str`, *optional*): measure this one trainer, once, and print it as JSON.
    """

    rounds: int = field(default=5, metadata={"help": "Measurements of each trainer."})
    methods: list[str] = field(default_factory=list, metadata={"help": "Parts of the names of the trainers."})
    only: str | None = field(default=None, metadata={"help": "Measure this one trainer, once, and print JSON."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {self.rounds}.")
        unknown = [part for part in self.methods if not any(part in name for name in _METHODS)]
        if self.only is not None and self.only not in _METHODS:
            unknown.append(self.only)
        if unknown:
            raise ValueError(f"No trainer is named {unknown[0]!r}: the trainers are {', '.join(_METHODS)}.")


def main(argv: list[str] | None = None) -> None:
    """Measures every trainer in turn, or one if `--only` is given, and prints the table."""
    parser = HfArgumentParser(cast(Any, StepArguments), prog="trl-bayes bench-step", description=__doc__)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.error(str(error))
    if args.only is not None:
        print(json.dumps(measure(args)))
        return
    console = Console(stderr=True)
    print(to_markdown(measure_all(args, lambda jobs: track(jobs, "measuring", console=console)), args.use_cpu))


def measured_methods(parts: Sequence[str]) -> list[str]:
    """Names of the yardstick and of the trainers whose name has one of the parts; all if there are none."""
    return [name for name in _METHODS if name == YARDSTICK or not parts or any(part in name for part in parts)]


def measure_all(args: StepArguments, show: Callable[[list[str]], Iterable[str]] = lambda jobs: jobs) -> Results:
    """
    Measures each trainer in a process of its own, one after the other.

    Args:
        args ([`StepArguments`]): `only` is not read.
        show (`Callable`, *optional*): wraps the list of jobs, to show progress.

    Raises:
        RuntimeError: a measurement failed; the message has the end of its output.
    """
    names = measured_methods(args.methods)
    results: Results = {name: [] for name in names}
    for name in show(names * args.rounds):
        results[name].append(_measure_apart(args, name))
    return results


def _measure_apart(args: StepArguments, name: str) -> dict[str, float]:
    size = {key: value for key, value in asdict(args).items() if key in StepSize.__dataclass_fields__}
    flags = [text for key, value in size.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-m", __spec__.name, *flags, "--only", name]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        end = "\n".join(finished.stderr.splitlines()[-20:])
        raise RuntimeError(f"The measurement of {name} failed; the end of its output:\n{end}")
    return json.loads(finished.stdout.splitlines()[-1])


def measure(args: StepArguments) -> dict[str, float]:
    """Median step time in seconds and peak memory in MiB of the trainer `args.only`, in this process."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        build_model(folder, args)
        train(_METHODS[str(args.only)], folder, args, [clock])
    return {"step_seconds": clock.median, "peak_mib": peak_memory(args.use_cpu)}


def peak_memory(use_cpu: bool = False) -> float:
    """Peak memory in MiB: the GPU's allocator if there is one that is used, else this process's resident set."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def device_line(use_cpu: bool = False) -> str:
    """What was measured on."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores"


def to_markdown(results: Results, use_cpu: bool = False) -> str:
    """Median over rounds, and the ratio to RLOOTrainer in the same round as median (min to max)."""
    lines = [
        device_line(use_cpu),
        "",
        "| trainer | step, s | ratio to RLOOTrainer | peak, MiB | ratio to RLOOTrainer |",
        "|---|---|---|---|---|",
    ]
    for name, rounds in results.items():
        cells = [name]
        for key, digits in (("step_seconds", 3), ("peak_mib", 0)):
            ours, theirs = ([one[key] for one in group] for group in (rounds, results[YARDSTICK]))
            cells += ratio_cells(ours, theirs[: len(ours)], digits)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
