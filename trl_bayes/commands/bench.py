"""Compare our trainers with TRL's: exact tasks, the embedded prior, step time and memory."""

import json
import math
import os
import pickle
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import HfArgumentParser

from ..benchmarks import embedded_benchmark, exact_benchmark
from ..benchmarks.benchmark_figure import Curve, Panel, divergence_figure
from ..benchmarks.embedded_benchmark import EmbeddedRun
from ..benchmarks.exact_benchmark import Method, Problem, Run
from ..benchmarks.learning_curve import log_spaced
from ..command_line.parser import nearest
from ..evaluation.evaluate import Evaluation
from . import bench_step
from .env import environment


T = TypeVar("T")
SECTIONS = ("exact", "embedded", "step")
_PROBLEMS = exact_benchmark.problems()
_FIGURE = "bench.png"


@dataclass
class BenchArguments:
    r"""
    Arguments of the benchmark. The default takes less than 15 minutes on two CPU cores.

    Parameters:
        sections (`list[str]`, *optional*): `exact`, tasks with all completions known; `embedded`, the language model
            that comes with the package; `step`, step time and peak memory on a random model. All by default.
        problems (`list[str]`, *optional*, defaults to `["letters", "hard-20k"]`): exact tasks: `letters`, `bigrams`,
            `balance`, which are soft; `hard-20k` and `hard-100k`, one constraint with two budgets.
        methods (`list[str]`, *optional*): parts of the names of the trainers to run; all by default.
        seeds (`list[int]`, *optional*, defaults to `[0, 1]`): seeds of the trainings.
        samples (`int`, *optional*): completions that each training draws, at most as many as its problem's own budget
            (102,400 for most). Defaults to 20,480 on exact tasks and 4,000 on the embedded prior.
        output_dir (`str`, *optional*, defaults to `"runs/bench"`): where `bench.json`, `bench.md` and `bench.png` go.
        device (`str`, *optional*, defaults to `"cpu"`): `cpu` or `cuda`, which also makes the random model larger.
        num_parallel (`int`, *optional*, defaults to `2`): trainings at the same time, each in a process with one CPU
            thread; with 1 they run in this process. Step time and memory are always measured alone.
        quick (`bool`, *optional*, defaults to `False`): a run of about two minutes that tries everything and measures
            nothing well.
    """

    sections: list[str] = field(default_factory=lambda: list(SECTIONS), metadata={"help": "exact, embedded, step."})
    problems: list[str] = field(
        default_factory=lambda: ["letters", "hard-20k"],
        metadata={"help": f"Exact tasks: {', '.join(_PROBLEMS)}."},
    )
    methods: list[str] = field(default_factory=list, metadata={"help": "Parts of the names of the trainers to run."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Seeds of the trainings."})
    samples: int | None = field(
        default=None,
        metadata={
            "help": "Completions that each training draws, at most as many as its problem's own budget. Defaults to "
            "20480 on exact tasks and 4000 on the embedded prior."
        },
    )
    output_dir: str = field(
        default="runs/bench", metadata={"help": "Where bench.json, bench.md and bench.png are written."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu, or cuda, which also makes the random model larger."})
    num_parallel: int = field(default=2, metadata={"help": "Trainings at the same time, each on one CPU thread."})
    quick: bool = field(default=False, metadata={"help": "A run of about two minutes, which measures nothing well."})

    def __post_init__(self) -> None:
        for name, given, known in (
            ("sections", self.sections, SECTIONS),
            ("problems", self.problems, tuple(_PROBLEMS)),
            ("device", [self.device], ("cpu", "cuda")),
        ):
            for word in given:
                if word not in known:
                    raise ValueError(f"`{name}`: {word!r} is not one of {', '.join(known)}{nearest(word, known)}.")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"`samples={self.samples}` trains nothing: set it to 1 or more.")
        if self.num_parallel < 1:
            raise ValueError(f"`num_parallel={self.num_parallel}` trains nothing: set it to 1 or more.")
        if any(not 0 <= seed < 2**32 - 1 for seed in self.seeds):
            raise ValueError(f"`seeds` must be between 0 and 2^32 - 2, got {self.seeds}.")
        names = self._all_methods()
        for part in self.methods:
            if not any(part in name for name in names):
                raise ValueError(f"`methods`: no trainer's name has {part!r} in it: they are {', '.join(names)}.")

    def _all_methods(self) -> list[str]:
        """Names of the trainers of the chosen sections."""
        found: list[str] = []
        if "exact" in self.sections:
            found += [method.name for name in self.problems for method in exact_benchmark.methods(_PROBLEMS[name])]
        if "embedded" in self.sections:
            found += [method.name for method in embedded_benchmark.methods()]
        if "step" in self.sections:
            found += bench_step.measured_methods([])
        return list(dict.fromkeys(found))

    @property
    def use_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def exact_samples(self) -> int:
        """Completions of a training on an exact task, at most."""
        return self.samples or (512 if self.quick else 20_480)

    @property
    def embedded_samples(self) -> int:
        """Completions of a training on the embedded prior, at most."""
        return self.samples or (160 if self.quick else 4_000)

    @property
    def prior_samples(self) -> int:
        """Samples of the embedded prior for each prompt."""
        return 100 if self.quick else 1100

    @property
    def policy_samples(self) -> int:
        """Samples of a policy trained on the embedded prior, for each prompt."""
        return 60 if self.quick else 400

    @property
    def step(self) -> bench_step.StepArguments:
        """What the step section measures."""
        size: dict[str, Any] = {"rounds": 2, "steps": 5, "batch_size": 16, "max_completion_length": 32}
        if not self.use_cpu:
            size |= {"hidden_size": 1024, "num_layers": 16, "vocab_size": 32_768}
            size |= {"rounds": 3, "steps": 10, "batch_size": 64, "max_completion_length": 128}
        if self.quick:
            size |= {"hidden_size": 64, "num_layers": 1, "vocab_size": 128, "rounds": 1, "steps": 1}
            size |= {"batch_size": 8, "max_completion_length": 4}
        return bench_step.StepArguments(**size, use_cpu=self.use_cpu, bf16=not self.use_cpu, methods=self.methods)


@dataclass
class Results:
    """What has been measured so far."""

    args: BenchArguments
    exact: list[Run] = field(default_factory=list)
    embedded: list[EmbeddedRun] = field(default_factory=list)
    prior: Evaluation | None = None
    step: bench_step.Results = field(default_factory=dict)
    seconds: float = 0.0


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the sections, writes the results after each training, and prints the tables."""
    parser = HfArgumentParser(cast(Any, BenchArguments), prog="trl-bayes bench", description=__doc__)
    try:
        (args,) = parser.parse_args_into_dataclasses(args=None if argv is None else list(argv))
        check_device(args.device)
        folder = prepare_folder(args.output_dir)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    start = time.perf_counter()
    results = Results(args)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for _ in run_sections(results, progress):
            results.seconds = time.perf_counter() - start
            write(results, folder)
    if drawn := panels(results):
        (folder / _FIGURE).write_bytes(divergence_figure(drawn))
    results.seconds = time.perf_counter() - start
    write(results, folder)
    print(to_markdown(results))
    written = ["bench.json", "bench.md", *([_FIGURE] if drawn else [])]
    console.print(f"Written to {folder}: {', '.join(written)}", soft_wrap=True)


def check_device(device: str) -> None:
    """
    Makes one GPU visible: with several, the Trainer would split each batch.

    Raises:
        ValueError: there is none; one sentence.
    """
    if device == "cuda":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # read when CUDA is first asked for, below
        if not torch.cuda.is_available():
            raise ValueError("`device=cuda`, but torch finds no CUDA GPU: set `--device cpu`.")


def prepare_folder(name: str) -> Path:
    """
    Makes the output folder.

    Raises:
        ValueError: it cannot be written to; one sentence.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir={folder}` cannot be written to: {error.strerror or error}.") from None
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def run_sections(results: Results, progress: Progress) -> Iterator[None]:
    """Fills the results, and yields after each measurement."""
    args = results.args
    if "exact" in args.sections:
        for results.exact in _in_order(exact_jobs(args), args.num_parallel, progress, "exact tasks"):
            yield
    if "embedded" in args.sections:
        _quiet()
        reference = embedded_benchmark.reference(args.prior_samples, use_cpu=args.use_cpu)
        results.prior = embedded_benchmark.prior_evaluation(reference)
        jobs = embedded_jobs(args, pickle.dumps(reference))
        for results.embedded in _in_order(jobs, args.num_parallel, progress, "embedded prior"):
            yield
    if "step" in args.sections:
        results.step = bench_step.measure_all(
            args.step, lambda jobs: progress.track(jobs, description="step time, memory")
        )
        yield


def exact_jobs(args: BenchArguments) -> list[Callable[[], Run]]:
    """A training for each problem, method and seed."""
    return [
        _exact_job(_PROBLEMS[name], method, seed, args)
        for name in dict.fromkeys(args.problems)
        for method in _chosen(exact_benchmark.methods(_PROBLEMS[name]), args)
        for seed in dict.fromkeys(args.seeds)
    ]


def _exact_job(problem: Problem, method: Method, seed: int, args: BenchArguments) -> Callable[[], Run]:
    steps = problem.steps(args.exact_samples)
    settings = {"evaluate_at": log_spaced(steps), "max_steps": steps, "use_cpu": args.use_cpu}
    return partial(exact_benchmark.train, problem, method, seed=seed, **cast(Any, settings))


def embedded_jobs(args: BenchArguments, reference: bytes) -> list[Callable[[], EmbeddedRun]]:
    """A training for each method and seed; they get the reference pickled, since tensors would be shared."""
    jobs: list[Callable[[], EmbeddedRun]] = []
    for method in _chosen(embedded_benchmark.methods(), args):
        steps = embedded_benchmark.steps(method, args.embedded_samples)
        settings = {"evaluate_at": log_spaced(steps, 6), "max_steps": steps, "use_cpu": args.use_cpu}
        settings["num_per_prompt"] = args.policy_samples
        jobs += [
            partial(_train_embedded, method, reference, seed=seed, **settings) for seed in dict.fromkeys(args.seeds)
        ]
    return jobs


def _train_embedded(method: Method, reference: bytes, **settings: Any) -> EmbeddedRun:
    return embedded_benchmark.train(method, pickle.loads(reference), **settings)


def _chosen(methods: Sequence[Method], args: BenchArguments) -> list[Method]:
    return [method for method in methods if not args.methods or any(part in method.name for part in args.methods)]


def _in_order(
    jobs: Sequence[Callable[[], T]], num_parallel: int, progress: Progress, description: str
) -> Iterator[list[T]]:
    """Runs the jobs, and yields all results so far, in the order of the jobs, whenever there is another."""
    bar = progress.add_task(description, total=len(jobs))
    done: dict[int, T] = {}
    for number, result in _run(jobs, num_parallel):
        done[number] = result
        progress.advance(bar)
        yield [done[place] for place in sorted(done)]


def _run(jobs: Sequence[Callable[[], T]], num_parallel: int) -> Iterator[tuple[int, T]]:
    """The results with the numbers of their jobs, as they come."""
    if num_parallel == 1 or len(jobs) < 2:
        _quiet()
        for number, job in enumerate(jobs):
            yield number, job()
        return
    with ProcessPoolExecutor(num_parallel, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        numbers = {pool.submit(job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupted benchmark does not start the rest


def _quiet() -> None:
    """One thread, since the models are tiny and more would wait for one another; and no output but our own bars."""
    torch.set_num_threads(1)
    # TRL calls methods of transformers by the names that they had before
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


# ---------------------------------------------------------------------------------------------------------------------
# The results


def machine(args: BenchArguments) -> dict[str, str]:
    """What the numbers depend on: processor, GPU, versions."""
    gpu = {} if args.use_cpu else {"gpu": torch.cuda.get_device_name()}
    return {"processor": processor_name(), **gpu, **environment()}


def processor_name() -> str:
    """The model of the processor, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(results: Results, folder: Path) -> None:
    """Writes `bench.json`, strict JSON with everything, and `bench.md`, the tables."""
    record = {
        "machine": machine(results.args),
        "arguments": asdict(results.args),
        "seconds": results.seconds,
        "exact": [exact_benchmark.to_record(run) for run in results.exact],
        "embedded": {
            "prior": None if results.prior is None else results.prior.to_dict(),
            "runs": [run.to_dict() for run in results.embedded],
        },
        "step": {"size": asdict(results.args.step), "measurements": results.step},
    }
    text = json.dumps(record, indent=1, allow_nan=False)
    (folder / "bench.json").write_text(text + "\n", encoding="utf-8")
    (folder / "bench.md").write_text(to_markdown(results, figure=_FIGURE), encoding="utf-8")


def to_markdown(results: Results, figure: str | None = None) -> str:
    """The tables of the sections that were run, under a line about the machine."""
    args = results.args
    about = machine(args)
    versions = ", ".join(f"{name} {about[name]}" for name in ("trl_bayes", "trl", "transformers", "torch", "python"))
    parts = [
        "# trl_bayes against TRL",
        f"{about.get('gpu', about['processor'])}, {about['cores']} CPU cores; {versions}. "
        f"Seeds {', '.join(map(str, args.seeds))}; {results.seconds / 60:.1f} minutes in all. "
        "p: posterior, π: policy, π₀: prior; divergences in nats.",
    ]
    at_once = f"{args.num_parallel} trainings at a time, one CPU thread each" if args.num_parallel > 1 else ""
    if results.exact:
        parts += [
            "## Exact tasks",
            "All completions are known, so every distance is exact. Means over seeds. Seconds are those of training"
            f"{', ' if at_once else ''}{at_once}.",
            exact_benchmark.to_markdown(results.exact),
            exact_benchmark.curves_to_markdown(results.exact),
        ]
    if results.prior is not None and results.embedded:
        parts += [
            "## The embedded prior",
            "Lines of Python; p is the prior given that the line parses. Means over seeds ± the standard error of one "
            "seed's estimate, in brackets the smallest and the largest seed. The error of KL(p‖π) and TV is mostly "
            "that of log Z and of the posterior's samples, which all rows share: rows differ by less.",
            embedded_benchmark.to_markdown(results.embedded, results.prior),
        ]
    if figure is not None and (results.exact or results.embedded):
        parts.append(f"![KL(p‖π) against completions and against seconds]({figure})")
    if results.step:
        size = args.step
        parts += [
            "## Step time and peak memory",
            f"A random Llama with {size.num_layers} layers of {size.hidden_size} and {size.vocab_size:,} tokens; "
            f"{size.batch_size} completions of at most {size.max_completion_length} tokens a step. Each measurement "
            f"is a process of its own, alone; medians of {size.rounds}, ratios with their range.",
            bench_step.to_markdown(results.step, args.use_cpu),
        ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def panels(results: Results) -> list[Panel]:
    """The problems of the figure."""
    found = []
    for name in dict.fromkeys(run.problem for run in results.exact):
        curves = [
            Curve(
                run.method,
                [point.samples for point in run.curve],
                [point.seconds for point in run.curve],
                [point.value.forward_kl for point in run.curve],
            )
            for run in results.exact
            if run.problem == name
        ]
        found.append(Panel(name, curves, curves[0].values[0]))
    if results.embedded and results.prior is not None:
        curves = [
            Curve(
                run.method,
                [point.samples for point in run.curve],
                [point.seconds for point in run.curve],
                [point.value.value if point.value.trusted else math.nan for point in run.curve],
            )
            for run in results.embedded
        ]
        found.append(Panel(embedded_benchmark.PROBLEM, curves, results.prior.metrics["forward_kl"].value))
    return found


if __name__ == "__main__":
    main()
