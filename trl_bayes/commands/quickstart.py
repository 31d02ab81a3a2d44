"""Fine-tune the embedded prior four ways towards lines that parse, measure the results and write a report."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
import trl
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel

from ..assets import embedded_path, shipped_file
from ..evaluation.evaluate import evaluate, evaluate_posterior, evaluate_prior
from ..evaluation.page import write_report
from ..evaluation.posterior import Posterior, condition
from ..evaluation.report import CurvePoint, Report, RunRecord, choose_lines
from ..language_models.completions import Completions
from ..language_models.settings import SamplingSettings
from ..prior.reference import draw_prior
from ..rewards import parses
from ..statistics.estimate import Estimate
from ..targets import Constraint


_TRAINED = "trained.json"  # written last into the folder of a run
PRIOR = "embedded:python_lines"
INTRO = (
    "A small language model that writes lines of Python is the prior; whether a line parses is the evidence; and the "
    "prior conditioned on lines that parse is the posterior, known here through exact samples. Four trainers start "
    "from the prior with the same budget of completions. Pure RL is paid for lines that parse and for nothing else; "
    "the other three approximate the posterior."
)


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
        return yaml.safe_load(self.recipe.read_text(encoding="utf-8"))


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


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is not trained yet, measures, and writes the report."""
    parser = HfArgumentParser(cast(Any, QuickstartArguments), prog="trl-bayes quickstart", description=__doc__)
    try:
        (args,) = parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))
        folder = prepare_folder(args)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    console = Console(stderr=True)
    start = time.perf_counter()
    train_all(args, folder, console)
    trained = time.perf_counter()
    report = measure_all(args, folder, console)
    report.settings |= {
        "seconds of training": round(trained - start),
        "seconds of measurement": round(time.perf_counter() - trained),
    }
    page = write_report(report, folder)
    write_metrics(report, folder)
    Console().print(results_table(report))
    Console().print(f"Report: {page}\nNumbers: {folder / 'metrics.json'}\nModels: {folder}/<run>", soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------------
# The output folder


def prepare_folder(args: QuickstartArguments) -> Path:
    """
    Makes the output folder; what an interrupted quickstart with the same arguments has trained is kept.

    Raises:
        ValueError: the folder holds something else, or a finished quickstart; one sentence.
        OSError: it cannot be written to.
    """
    folder = Path(args.output_dir)
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
    return (folder / _TRAINED).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Training, by the same commands and recipes that a user would write


def train_all(args: QuickstartArguments, folder: Path, console: Console) -> None:
    """Trains every run that is not trained yet, `num_parallel` at a time."""
    waiting = [run for run in RUNS if not is_trained(folder / run.name)]
    with _progress(console) as progress, ThreadPoolExecutor(args.num_parallel) as pool:
        jobs = [pool.submit(train, run, args, folder / run.name, _bar(progress, run, args)) for run in waiting]
        for job in jobs:
            job.result()


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
    (folder / _TRAINED).write_text(json.dumps(record), encoding="utf-8")


def _num_steps(run: Run, args: QuickstartArguments) -> int:
    return {**run.settings, **args.overrides}["max_steps"]


def _steps_done(log: Path, total: int) -> int:
    """Where the training's own progress bar, in its log, has got to."""
    found = re.findall(rf"(\d+)/{total} \[", log.read_text(encoding="utf-8", errors="replace"))
    return int(found[-1]) if found else 0


def _progress(console: Console) -> Progress:
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


# ---------------------------------------------------------------------------------------------------------------------
# Measurement: against exact samples of the posterior


def measure_all(args: QuickstartArguments, folder: Path, console: Console) -> Report:
    """Measures prior, posterior, and every run with its checkpoints, and removes the checkpoints."""
    torch.set_num_threads(args.num_parallel)  # the cores that training had
    settings = RUNS[0].settings
    prior, tokenizer = _load(embedded_path(PRIOR)), AutoTokenizer.from_pretrained(embedded_path(PRIOR))
    lines = Path(embedded_path(PRIOR, "prompts.jsonl")).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    checkpoints = {run.name: _checkpoints(folder / run.name) for run in RUNS}
    with _progress(console) as progress:
        bar = progress.add_task("Measuring", total=1 + sum(len(found) + 1 for found in checkpoints.values()))
        reference = draw_prior(
            prior,
            tokenizer,
            prompts,
            [parses],
            args.prior_samples,
            SamplingSettings(settings["max_completion_length"], seed=args.seed),
        )
        # Distinct-n depends on the number of samples: every row's is measured from as many
        exact = condition(reference, Constraint(), diversity_per_prompt=args.policy_samples)
        of_checkpoints = condition(reference, Constraint(), max_per_prompt=args.checkpoint_samples)
        progress.advance(bar)

        def measured(model: Path, posterior: Posterior, number: int, diversity: bool) -> tuple[Any, Completions]:
            outcome = evaluate(
                _load(model),
                prior,
                tokenizer,
                [parses],
                posterior,
                num_per_prompt=number,
                name=model.name,
                diversity=diversity,
                seed=args.seed + 1,
            )
            progress.advance(bar)
            return outcome

        runs = []
        for run in RUNS:
            curve = [_point(0, 0, evaluate_prior(of_checkpoints, diversity=False).metrics)]
            for step, checkpoint in checkpoints[run.name]:
                evaluation, _ = measured(checkpoint, of_checkpoints, args.checkpoint_samples, False)
                curve.append(_point(step, step * run.settings["per_device_train_batch_size"], evaluation.metrics))
            evaluation, completions = measured(folder / run.name, exact, args.policy_samples, True)
            if checkpoints[run.name]:  # the last one is the model itself, now measured better
                curve[-1] = _point(curve[-1].step, curve[-1].samples, evaluation.metrics)
            runs.append(_record(run, args, folder, evaluation, completions, curve))
    for run in RUNS:
        for _, checkpoint in checkpoints[run.name]:
            shutil.rmtree(checkpoint)
    return _report(args, exact, runs)


def _load(path: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of a run's checkpoints, in order."""
    return sorted((int(path.name.removeprefix("checkpoint-")), path) for path in folder.glob("checkpoint-*"))


def _point(step: int, samples: int, metrics: Mapping[str, Estimate]) -> CurvePoint:
    return CurvePoint(step, samples, dict(metrics))


def _valid(completions: Completions) -> torch.Tensor:
    return completions.rewards[:, 0] > 0.5


def _record(
    run: Run,
    args: QuickstartArguments,
    folder: Path,
    evaluation: Any,
    completions: Completions,
    curve: list[CurvePoint],
) -> RunRecord:
    evaluation.name = run.name
    trained = json.loads((folder / run.name / _TRAINED).read_text(encoding="utf-8"))
    return RunRecord(
        run.name,
        run.label,
        run.target,
        evaluation,
        curve,
        choose_lines(completions, _valid(completions)),
        {**run.settings, **args.overrides},
        trained["seconds"],
    )


def _report(args: QuickstartArguments, exact: Posterior, runs: list[RunRecord]) -> Report:
    drawn = exact.prior.completions
    posterior = RunRecord(
        "posterior",
        "Posterior (exact)",
        "prior given that the line parses",
        evaluate_posterior(exact),
        samples=choose_lines(exact.exact, _valid(exact.exact)),
    )
    prior = RunRecord("prior", "Prior", "", evaluate_prior(exact), samples=choose_lines(drawn, _valid(drawn)))
    return Report(
        title="trl_bayes quickstart: lines of Python that parse",
        intro=INTRO,
        problem={
            "prior": "a language model of Python statements, half of them with a backslash behind",
            "evidence": "1 if the completed line parses as one Python statement, else 0",
            "prompts": ", ".join(repr(prompt) for prompt in drawn.prompts),
            "longest completion": f"{exact.prior.settings.max_new_tokens} tokens",
        },
        posterior=posterior,
        prior=prior,
        runs=runs,
        hard=True,
        reward_label="share of lines that parse",
        reward_is_share=True,
        valid_label="parses",
        invalid_label="does not parse",
        settings={
            "seed": args.seed,
            "prior samples": len(exact.phi),
            "exact posterior samples": len(exact.exact),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "CPU threads": args.num_parallel,
        },
    )


# ---------------------------------------------------------------------------------------------------------------------
# Results


def write_metrics(report: Report, folder: Path) -> None:
    """Writes `metrics.json`: every estimate of every row, with its standard error."""
    rows = {row.name: row.evaluation.to_dict() for row in report.rows if row.evaluation is not None}
    text = json.dumps({"settings": report.settings, "rows": rows}, indent=1, allow_nan=False)
    (folder / "metrics.json").write_text(text, encoding="utf-8")


_COLUMNS = {
    "parse": ("reward", True),
    "KL(π‖π₀)": ("kl_prior", False),
    "KL(p‖π)": ("forward_kl", False),
    "entropy": ("entropy", False),
    "distinct-2": ("distinct_2", False),
    "distinct lines": ("share_distinct", True),
}


def results_table(report: Report) -> Table:
    """The main numbers of every row, in nats unless they are shares; their standard errors are in the report."""
    table = Table(title="p: posterior, π: policy, π₀: prior; distances and entropy in nats")
    table.add_column("")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for row in report.rows:
        estimates = [(row.metric(metric), percent) for metric, percent in _COLUMNS.values()]
        table.add_row(row.label, *(_cell(estimate, percent) for estimate, percent in estimates))
    return table


def _cell(estimate: Estimate | None, percent: bool) -> str:
    if estimate is None:
        return "–"
    if not estimate.trusted:
        return "unsure"
    return f"{estimate.value:.1%}" if percent else f"{estimate.value:.3g}"
