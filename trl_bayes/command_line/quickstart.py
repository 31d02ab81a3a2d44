"""The quickstart's runs: which there are, where they go, and their training by commands as a user would write them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..assets import shipped_file
from .parser import read_recipe


TRAINED = "trained.json"  # written last into the folder of a run


@dataclass(frozen=True)
class Run:
    """A training run: its name, its label in the report, the command and recipe that train it, and its target."""

    name: str
    label: str
    command: str
    target: str

    @property
    def recipe(self) -> Path:
        """The YAML of this run."""
        return shipped_file(f"recipes/python_syntax/{self.name}.yaml")

    @property
    def settings(self) -> dict[str, Any]:
        """What the YAML says."""
        return read_recipe(str(self.recipe))


RUNS = (
    Run("pure_rl", "Pure RL", "kl-rl", "the largest reward"),
    Run("kl_rl", "KL-RL", "kl-rl", "prior tilted by exp(reward / beta)"),
    Run("dpg", "DPG", "dpg", "prior given that the line parses"),
    Run("f_dpg", "f-DPG (JS)", "f-dpg", "prior given that the line parses, Jensen-Shannon"),
)


@dataclass
class QuickstartArguments:
    r"""
    Arguments of the quickstart.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"runs/quickstart"`):
            Where the models, `metrics.json` and `report.html` are written.
        quick (`bool`, *optional*, defaults to `False`):
            A run of about a minute, with less training and fewer samples: everything works, little is learned.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to start again where `output_dir` holds a finished quickstart.
        seed (`int`, *optional*, defaults to `0`):
            Seed of training and measurement.
        num_parallel (`int`, *optional*, defaults to `2`):
            Trainings at the same time, each on one CPU thread.
    """

    output_dir: str = field(
        default="runs/quickstart", metadata={"help": "Where the models, metrics.json and report.html are written."}
    )
    quick: bool = field(default=False, metadata={"help": "A run of about a minute, which learns little."})
    overwrite: bool = field(default=False, metadata={"help": "Start again where output_dir holds a finished run."})
    seed: int = field(default=0, metadata={"help": "Seed of training and measurement."})
    num_parallel: int = field(default=2, metadata={"help": "Trainings at the same time, each on one CPU thread."})

    def __post_init__(self) -> None:
        if self.num_parallel < 1:
            raise ValueError(f"`num_parallel={self.num_parallel}` trains nothing: set it to 1 or more.")

    @property
    def prior_samples(self) -> int:
        """Samples of the prior for each prompt."""
        return 100 if self.quick else 1100

    @property
    def policy_samples(self) -> int:
        """Samples of each trained policy for each prompt."""
        return 60 if self.quick else 440

    @property
    def checkpoint_samples(self) -> int:
        """Samples of each checkpoint for each prompt."""
        return 20 if self.quick else 80

    @property
    def overrides(self) -> dict[str, int]:
        """Settings of the training commands that differ from the recipes."""
        return {"seed": self.seed, **({"max_steps": 8, "save_steps": 4} if self.quick else {})}


# ---------------------------------------------------------------------------------------------------------------------
# The output folder


def prepare_quickstart(args: QuickstartArguments) -> Path:
    """
    Makes the output folder; what an interrupted quickstart with the same arguments has trained is kept.

    Raises:
        ValueError: the folder holds something else, or a finished quickstart; one sentence.
        OSError: it cannot be written to.
    """
    folder = Path(args.output_dir).expanduser()
    settings_file = folder / "quickstart.json"
    settings = {key: value for key, value in asdict(args).items() if key in ("quick", "seed")}
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir={folder}` is a file: name a folder.")
    if args.overwrite:
        for name in [run.name for run in RUNS]:
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "metrics.json").unlink(missing_ok=True)
    elif (folder / "metrics.json").exists():
        raise ValueError(
            f"`output_dir={folder}` holds a finished quickstart: set --overwrite, or name another folder."
        )
    elif settings_file.exists() and json.loads(settings_file.read_text(encoding="utf-8")) != settings:
        raise ValueError(
            f"`output_dir={folder}` holds a quickstart begun with other arguments: set --overwrite, or name another "
            "folder."
        )
    elif folder.exists() and any(folder.iterdir()) and not settings_file.exists():
        raise ValueError(f"`output_dir={folder}` is not empty: set --overwrite, or name another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settings_file.write_text(json.dumps(settings), encoding="utf-8")
    except OSError as error:
        raise OSError(f"`output_dir={folder}` cannot be written to: {error.strerror or error}.") from None
    return folder


def is_trained(folder: Path) -> bool:
    """Whether a run has come to its end."""
    return (folder / TRAINED).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Training, by the same commands and recipes that a user would write


def train_all(args: QuickstartArguments, folder: Path, console: Console) -> None:
    """Trains every run that is not trained yet, `num_parallel` at a time."""
    waiting = [run for run in RUNS if not is_trained(folder / run.name)]
    with progress_bars(console) as progress, ThreadPoolExecutor(args.num_parallel) as pool:
        jobs = [pool.submit(train, run, args, folder / run.name, _bar(progress, run, args)) for run in waiting]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # a failed or interrupted one does not start the rest


def train(run: Run, args: QuickstartArguments, folder: Path, show: Callable[[int], None]) -> None:
    """
    Runs `trl-bayes COMMAND --config RECIPE` in a process of its own, with its output in `log.txt`.

    Raises:
        RuntimeError: the command failed; the message has the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    flags = [text for name, value in args.overrides.items() for text in (f"--{name}", str(value))]
    command = [run.command, "--config", str(run.recipe), "--output_dir", str(folder), "--overwrite", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "trl_bayes", *command], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                time.sleep(0.5)
                show(_steps_done(log, _num_steps(run, args)))
        finally:
            process.kill()  # an interrupted quickstart leaves no training behind
    if process.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
        raise RuntimeError(f"{run.label} failed; the end of {log}:\n{tail}")
    record = {"seconds": round(time.perf_counter() - start, 1)}
    (folder / TRAINED).write_text(json.dumps(record), encoding="utf-8")


def _num_steps(run: Run, args: QuickstartArguments) -> int:
    return {**run.settings, **args.overrides}["max_steps"]


def _steps_done(log: Path, total: int) -> int:
    """Where the training's own progress bar, in its log, has got to."""
    found = re.findall(rf"(\d+)/{total} \[", log.read_text(encoding="utf-8", errors="replace"))
    return int(found[-1]) if found else 0


def progress_bars(console: Console) -> Progress:
    """Bars with a count and the time."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _bar(progress: Progress, run: Run, args: QuickstartArguments) -> Callable[[int], None]:
    """A function that moves a bar of its own to a number of steps."""
    total = _num_steps(run, args)
    task = progress.add_task(f"Training: {run.label}", total=total, start=False)

    def show(done: int) -> None:
        if done and not progress.tasks[task].started:
            progress.start_task(task)
        progress.update(task, completed=done)

    return show
