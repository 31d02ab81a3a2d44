"""Step time and peak memory of each trainer on a random model, as ratios to RLOOTrainer's."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.progress import Progress

from ..language_models.settings import at_least
from .section import DeviceArguments, Findings
from .tables import markdown_table
from .timing import Clock, ProcessorClock, SizeArguments, StepSize, build_model, measured_trainers, ratio_cells, train
from .trainings import check_parts, chosen


YARDSTICK = "TRL RLOOTrainer"
Measurements = dict[str, list[dict[str, float]]]


@dataclass
class StepArguments(SizeArguments, DeviceArguments):
    r"""
    Arguments of the section, besides those of [`~trl_bayes.benchmarks.timing.SizeArguments`] and
    [`~trl_bayes.benchmarks.section.DeviceArguments`]. A GPU has a larger model by default, and bfloat16.

    Each measurement is a process of its own, so peak memory is that of one trainer; rounds take the trainers in turn,
    so a slow spell of the machine falls on all of them.

    Parameters:
        rounds (`int`, *optional*): measurements of each trainer. Defaults to 2 on the CPU and 3 on a GPU.
        processor_time (`bool`, *optional*, defaults to `False`):
            Whether a step is measured in seconds of processor time, of all threads, which work of others on the same
            machine hardly changes. For the CPU only.
        methods (`list[str]`, *optional*): parts of the names of the trainers to measure beside RLOOTrainer.
        quick (`bool`, *optional*, defaults to `False`): one step of a tiny model, which measures nothing well.
    """

    rounds: int | None = field(default=None, metadata={"help": "Measurements of each trainer."})
    processor_time: bool = field(
        default=False, metadata={"help": "Measure seconds of processor time, on a CPU that has other work too."}
    )
    methods: list[str] = field(default_factory=list, metadata={"help": "Parts of the names of the trainers."})
    quick: bool = field(default=False, metadata={"help": "Try everything in a minute, and measure nothing well."})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("rounds", self.num_rounds)
        check_parts(measured_trainers(), self.methods)
        if self.processor_time and not self.use_cpu:
            raise ValueError("`processor_time` measures the CPU's work, and a GPU is used: leave `device` at cpu.")
        _ = self.size  # refuses what cannot be measured

    @property
    def num_rounds(self) -> int:
        if self.rounds is not None:
            return self.rounds
        return 1 if self.quick else 2 if self.use_cpu else 3

    @property
    def size(self) -> StepSize:
        """What is measured."""
        if self.quick:
            size = StepSize(64, num_layers=1, vocab_size=128, max_completion_length=4, batch_size=8, steps=1)
        elif self.use_cpu:
            size = StepSize(max_completion_length=32, batch_size=16, steps=5)
        else:
            size = StepSize(1024, 16, vocab_size=32_768, max_completion_length=128, batch_size=64, steps=10)
        return self.given_size(replace(size, use_cpu=self.use_cpu, bf16=not self.use_cpu))


def run(args: StepArguments, progress: Progress) -> Iterator[Findings]:
    """Measures each trainer in a process of its own, one after the other."""
    names = measured_names(args.methods)
    size = args.size
    found: Measurements = {name: [] for name in names}
    for number, name in enumerate(progress.track(names * args.num_rounds, description="step time, memory"), start=1):
        found[name].append(measure_apart(size, name))
        if number % len(names) == 0:  # a round is complete
            record = {"size": asdict(size), "rounds": args.num_rounds, "measurements": found}
            yield Findings(record, to_markdown(found, size, args.processor_time))


def measured_names(parts: Iterable[str]) -> list[str]:
    """Names of the yardstick and of the trainers whose name has one of the parts; all if there are none."""
    wanted = {setup.name for setup in chosen(measured_trainers(), list(parts))} | {YARDSTICK}
    return [setup.name for setup in measured_trainers() if setup.name in wanted]


def measure_apart(size: StepSize, name: str) -> dict[str, float]:
    """
    Step time and peak memory of a trainer, in a process of its own.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    command = [sys.executable, "-m", __name__, name, json.dumps(asdict(size))]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        end = "\n".join(finished.stderr.splitlines()[-20:])
        raise RuntimeError(f"The measurement of {name} failed; the end of its output:\n{end}")
    return json.loads(finished.stdout.splitlines()[-1])


def measure(size: StepSize, name: str) -> dict[str, float]:
    """Median step time and processor time in seconds and peak memory in MiB of a trainer, in this process."""
    clock, processor = Clock(), ProcessorClock()
    setup = next(setup for setup in measured_trainers() if setup.name == name)
    with tempfile.TemporaryDirectory() as folder:
        build_model(folder, size)
        train(setup, folder, size, [clock, processor])
    return {
        "step_seconds": clock.median,
        "processor_seconds": processor.median,
        "peak_mib": peak_memory(size.use_cpu),
    }


def peak_memory(use_cpu: bool = False) -> float:
    """
    Peak memory in MiB: the GPU's allocator if there is one that is used, else this process's resident set.

    Linux counts twice: `VmHWM` from this program's beginning, which is what is meant, and `ru_maxrss` from the peak of
    the process that started it.
    """
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    own_peak = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return (own_peak or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])[0] / 2**10


def device_line(use_cpu: bool) -> str:
    """What was measured on."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores"


def to_markdown(found: Measurements, size: StepSize, processor_time: bool = False) -> str:
    """The section's part of the page."""
    text = (
        f"A random Llama with {size.num_layers} layers of {size.hidden_size} and {size.vocab_size:,} tokens on "
        f"{device_line(size.use_cpu)}; {size.batch_size} completions of at most {size.max_completion_length} tokens a "
        f"step. Each measurement is a process of its own, alone; medians of {len(found[YARDSTICK])}, ratios with "
        f"their range.{' Seconds are of processor time.' if processor_time else ''}"
    )
    key = "processor_seconds" if processor_time else "step_seconds"
    return "\n\n".join(["## Step time and peak memory", text, table(found, key)])


def table(found: Measurements, seconds: str = "step_seconds") -> str:
    """Median over rounds, and the ratio to RLOOTrainer in the same round as median (min to max)."""
    rows = []
    for name, rounds in found.items():
        cells = [name]
        for key, digits in ((seconds, 3), ("peak_mib", 0)):
            ours, theirs = ([one[key] for one in group] for group in (rounds, found[YARDSTICK]))
            cells += ratio_cells(ours, theirs, digits)
        rows.append(cells)
    return markdown_table(["trainer", "step, s", "ratio to RLOOTrainer", "peak, MiB", "ratio to RLOOTrainer"], rows)


if __name__ == "__main__":  # by `measure_apart`
    print(json.dumps(measure(StepSize(**json.loads(sys.argv[2])), sys.argv[1])))
