"""Measure what our trainers add to a step of GRPOTrainer in a run of several processes."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import HfArgumentParser

from ..benchmarks.exact_benchmark import Method, methods, problems
from ..benchmarks.step_benchmark import Clock, ProcessorClock, StepSize, build_model, ratio_cells, train


_YARDSTICK = "TRL GRPOTrainer"


@dataclass
class ScalingArguments(StepSize):
    r"""
    Arguments of the scaling benchmark, which `accelerate launch -m trl_bayes.commands.bench_scaling` starts, besides
    the [`~trl_bayes.benchmarks.step_benchmark.StepSize`].

    All trainers are measured in the same processes, and rounds take them in turn, forwards and backwards, so a slow
    spell of the machine falls on all of them. What is compared is whole steps: sampling, rewards, scoring and update.
    Seconds of processor time, summed over processes, say how much work there is on a CPU, whatever else the machine
    is busy with.

    Parameters:
        rounds (`int`, *optional*, defaults to `6`): measurements of each trainer.
        methods (`list[str]`, *optional*): parts of the names of the trainers to measure beside GRPOTrainer.
    """

    batch_size: int = field(default=16, metadata={"help": "Completions of a step, in each process."})
    steps: int = field(default=5, metadata={"help": "Timed steps of a measurement, after two that are not."})
    rounds: int = field(default=6, metadata={"help": "Measurements of each trainer."})
    methods: list[str] = field(default_factory=list, metadata={"help": "Parts of the names of the trainers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {self.rounds}.")
        ours = [method.name for method in methods(problems()["letters"]) if method.is_ours]
        unknown = [part for part in self.methods if not any(part in name for name in ours)]
        if unknown:
            raise ValueError(f"No trainer of ours is named {unknown[0]!r}: they are {', '.join(ours)}.")


class Step(NamedTuple):
    """What one optimizer step takes, generation included."""

    wall: float  # seconds, of the slowest process
    work: float  # seconds of processor time, of all processes together


def main(argv: list[str] | None = None) -> None:
    """Measures GRPOTrainer and ours in turn, and prints the table in the first process."""
    parser = HfArgumentParser(cast(Any, ScalingArguments), prog="trl-bayes bench-scaling", description=__doc__)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.error(str(error))
    state = PartialState(cpu=args.use_cpu)
    if state.num_processes == 1:
        print("There is one process only: start it by `accelerate launch` to measure several.", file=sys.stderr)
    chosen = [method for method in methods(problems()["letters"]) if _is_wanted(method, args.methods)]
    steps: dict[str, list[Step]] = {method.name: [] for method in chosen}
    finished = []  # kept: to free the reducer of a DDP model while others train can hang in gloo
    with tempfile.TemporaryDirectory() as own_folder:
        (folder,) = broadcast_object_list([own_folder])
        if state.is_main_process:
            build_model(folder, args)
        state.wait_for_everyone()
        for number in range(args.rounds):
            for method in chosen if number % 2 == 0 else reversed(chosen):
                trainer, step = measure(method, folder, args)
                finished.append(trainer)
                steps[method.name].append(step)
        if state.is_main_process:
            print(to_markdown(steps, state.num_processes, str(state.device)), flush=True)
        state.wait_for_everyone()
    finished[-1].end()


def _is_wanted(method: Method, parts: Sequence[str]) -> bool:
    return method.name == _YARDSTICK or (method.is_ours and (not parts or any(part in method.name for part in parts)))


def measure(method: Method, folder: str, args: ScalingArguments) -> tuple[Any, Step]:
    """The trainer after its run, and its median step."""
    clock, processor = Clock(), ProcessorClock()
    trainer = train(method, folder, args, [clock, processor])
    wall, work = zip(*gather_object([[clock.median, processor.median]]), strict=True)
    return trainer, Step(max(wall), sum(work))


def to_markdown(steps: dict[str, list[Step]], num_processes: int, device: str) -> str:
    """Median over rounds, and the ratio to GRPOTrainer in the same round as median (min to max)."""
    lines = [
        f"{num_processes} processes, {device}",
        "",
        "| trainer | step, s | ratio to GRPOTrainer | processor time, s | ratio to GRPOTrainer |",
        "|---|---|---|---|---|",
    ]
    for name, rounds in steps.items():
        cells = [name]
        for ours, theirs in zip(zip(*rounds, strict=True), zip(*steps[_YARDSTICK], strict=True), strict=True):
            cells += ratio_cells(ours, theirs, digits=3)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
