"""What our trainers add to a step of GRPOTrainer in a run of several processes, which `accelerate launch` starts."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from packaging.version import Version
from rich.progress import Progress

from ..language_models.settings import at_least
from .section import Findings
from .tables import markdown_table
from .timing import Clock, ProcessorClock, SizeArguments, StepSize, build_model, measured_trainers, ratio_cells, train
from .trainings import TrainerSetup, check_parts, chosen


_YARDSTICK = "TRL GRPOTrainer"


@dataclass
class ScalingArguments(SizeArguments):
    r"""
    Arguments of the section, besides those of [`~trl_bayes.benchmarks.timing.SizeArguments`]; it is started by
    `accelerate launch -m trl_bayes.commands.bench scaling`.

    All trainers are measured in the same processes, and rounds take them in turn, forwards and backwards, so a slow
    spell of the machine falls on all of them. What is compared is whole steps: sampling, rewards, scoring and update.
    Seconds of processor time, summed over processes, say how much work there is on a CPU, whatever else the machine
    is busy with.

    Parameters:
        use_cpu (`bool`, *optional*, defaults to `False`): train on the CPU though there is a GPU.
        rounds (`int`, *optional*, defaults to `6`): measurements of each trainer.
        methods (`list[str]`, *optional*): parts of the names of the trainers to measure beside GRPOTrainer.
    """

    page: ClassVar[str] = "scaling"

    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU though there is a GPU."})
    rounds: int = field(default=6, metadata={"help": "Measurements of each trainer."})
    methods: list[str] = field(default_factory=list, metadata={"help": "Parts of the names of the trainers."})

    def __post_init__(self) -> None:
        at_least("rounds", self.rounds)
        check_parts(_ours(), self.methods)
        _ = self.size  # refuses what cannot be measured

    @property
    def size(self) -> StepSize:
        """What is measured."""
        return self.given_size(StepSize(batch_size=16, steps=5, use_cpu=self.use_cpu))


class Step(NamedTuple):
    """What one optimizer step takes, generation included."""

    wall: float  # seconds, of the slowest process
    work: float  # seconds of processor time, of all processes together


def run(args: ScalingArguments, progress: Progress) -> Iterator[Findings]:
    """Measures GRPOTrainer and ours in turn; only the first process has findings."""
    state = PartialState(cpu=args.use_cpu)
    if state.num_processes == 1:
        print("There is one process only: start it by `accelerate launch` to measure several.", file=sys.stderr)
    setups = measured(args.methods)
    steps: dict[str, list[Step]] = {setup.name: [] for setup in setups}
    turns = [setup for number in range(args.rounds) for setup in (setups if number % 2 == 0 else reversed(setups))]
    finished = []  # kept: to free the reducer of a DDP model while others train can hang in gloo
    with tempfile.TemporaryDirectory() as own_folder:
        (folder,) = broadcast_object_list([own_folder])
        if state.is_main_process:
            build_model(folder, args.size)
        state.wait_for_everyone()
        for setup in progress.track(turns, description="steps of several processes"):
            trainer, step = measure(setup, folder, args.size)
            finished.append(trainer)
            steps[setup.name].append(step)
        if state.is_main_process:
            about = {"processes": state.num_processes, "device": str(state.device), "size": asdict(args.size)}
            record = {**about, "steps": {name: [one._asdict() for one in all_of] for name, all_of in steps.items()}}
            yield Findings(record, to_markdown(steps, state.num_processes, str(state.device)))
        state.wait_for_everyone()
    if Version(transformers.__version__) >= Version("5.18.0"):
        finished[-1].end()


def _ours() -> list[TrainerSetup]:
    return [setup for setup in measured_trainers() if setup.is_ours]


def measured(parts: Sequence[str]) -> list[TrainerSetup]:
    """GRPOTrainer, and those of ours whose name has one of the parts; all of ours if there are none."""
    return [*(setup for setup in measured_trainers() if setup.name == _YARDSTICK), *chosen(_ours(), parts)]


def measure(setup: TrainerSetup, folder: str, size: StepSize) -> tuple[Any, Step]:
    """The trainer after its run, and its median step."""
    clock, processor = Clock(), ProcessorClock()
    trainer = train(setup, folder, size, [clock, processor])
    wall, work = zip(*gather_object([[clock.median, processor.median]]), strict=True)
    return trainer, Step(max(wall), sum(work))


def to_markdown(steps: dict[str, list[Step]], num_processes: int, device: str) -> str:
    """The section's part of the page."""
    text = f"{num_processes} processes, {device}. Medians over rounds, ratios within a round (with their range)."
    return "\n\n".join(["## Steps of several processes", text, table(steps)])


def table(steps: dict[str, list[Step]]) -> str:
    """Median over rounds, and the ratio to GRPOTrainer in the same round as median (min to max)."""
    rows = []
    for name, rounds in steps.items():
        cells = [name]
        for ours, theirs in zip(zip(*rounds, strict=True), zip(*steps[_YARDSTICK], strict=True), strict=True):
            cells += ratio_cells(ours, theirs, digits=3)
        rows.append(cells)
    ratio = "ratio to GRPOTrainer"
    return markdown_table(["trainer", "step, s", ratio, "processor time, s", ratio], rows)
