"""Launches of `worker.py`: one per backend, in two processes, whose results many tests read."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
import yaml
from filelock import FileLock

from trl_bayes.assets import shipped_file
from trl_bayes.benchmarks.tiny import letter_count_task


WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]
EXTENSIONS = ROOT / ".cache" / "torch_extensions"  # of this checkout: no other program's build can hold its lock
BACKENDS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SCRIPTED = ("kl_rl", "f_dpg", "dpg", "tb", "dpg_replay", "lora", "calibrated", "xpo", "xpo_fresh")
COMPARED = (*SCRIPTED, "bf16")
RESUMABLE = ("straight", "straight_lora", "stopped_lora", "killed")  # the last ends the processes
CASES: dict[str, tuple[str, ...]] = {
    "one": COMPARED,
    "ddp": (*COMPARED, "uneven", "draws", "stopped_prior", "grown_prior", *RESUMABLE),
    "zero1": COMPARED,
    "zero2": (*COMPARED, "uneven", *RESUMABLE),
    "zero3": (*COMPARED, "uneven", "draws", "in_parts", *RESUMABLE),
    "fsdp2": (*COMPARED, "uneven", *RESUMABLE),
    "resumed": ("resumed", "resumed_lora"),
}
# DeepSpeed leaves small parameters whole by default, so that a tiny model would not be sharded at all
SHARD_EVERYTHING = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "bf16": {"enabled": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


class Finished(NamedTuple):
    returncode: int
    log: Path  # both outputs of all processes

    def tail(self) -> str:
        return "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-60:])


class Run(NamedTuple):
    """What the processes of one launch have saved."""

    folder: Path
    finished: Finished
    num_processes: int

    def __call__(self, case: str) -> list[dict[str, Any]]:
        """The results of all processes; fails if one of them has none."""
        files = [self.file(case, rank) for rank in range(self.num_processes)]
        if not all(file.exists() for file in files):
            pytest.fail(f"{self.folder.name} has no result for {case!r}:\n{self.finished.tail()}")
        return [torch.load(file, weights_only=False) for file in files]

    def file(self, case: str, rank: int) -> Path:
        return self.folder / f"{case}.rank{rank}.pt"


def run_and_wait(command: list[str], log: Path, seconds: float, **settings: Any) -> Finished:
    """Runs a command to its end, or to that of its time: then it is killed with all that it has started."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    own |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *settings.pop("python_path", [])])}
    own |= {"TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
    own |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}  # ninja
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRL_BAYES"))}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**inherited, **own}, **settings
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            finished = Finished(-1, log)
            pytest.fail(f"{command} has not finished in {seconds} s:\n{finished.tail()}")
        finally:
            _kill(process)
    return Finished(process.returncode, log)


def _kill(process: subprocess.Popen) -> None:
    """Also the workers, which the launcher puts into sessions of their own."""
    if process.poll() is not None:
        return  # it takes its workers along
    family = psutil.Process(process.pid)
    for member in [*family.children(recursive=True), family]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()


def accelerate(config_file: Path | str, *arguments: Path | str) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file)]
    return [*launcher, *map(str, arguments)]


# --- What is made once for all pytest processes ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "distributed"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def once(folder: Path) -> Iterator[bool]:
    """Whether this is the first to come, while all others wait for it."""
    with FileLock(f"{folder}.lock"):
        is_first = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        yield is_first


@pytest.fixture(scope="session")
def models(shared: Path) -> Path:
    """Two models of one vocabulary: `policy` and `prior`."""
    folder = shared / "models"
    with once(folder) as is_first:
        if is_first:
            task = letter_count_task()
            task.build_model(folder / "policy")
            replace(task, seed=1).build_model(folder / "prior")
    return folder


@pytest.fixture(scope="session")
def deepspeed_is_built(shared: Path) -> None:
    """DeepSpeed compiles its communication for CPUs once in a checkout, which takes a minute.

    torch's own lock is a file that a killed build leaves behind, and for which every later build waits for ever: here
    builds are kept apart by a lock that ends with its process, so that a lock found after it is a dead one's.
    """
    folder = shared / "deepspeed"
    EXTENSIONS.mkdir(parents=True, exist_ok=True)
    with once(folder) as is_first, FileLock(f"{EXTENSIONS}.lock"):
        if is_first:
            for left_behind in EXTENSIONS.glob("*/lock"):
                left_behind.unlink()
            build = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"
            finished = run_and_wait([sys.executable, "-c", build], folder / "log", seconds=400)
            assert finished.returncode == 0, finished.tail()


def write_config(backend: str, folder: Path) -> Path:
    """The configuration that is shipped for two processes, changed where the backend has none of its own."""
    shipped = {"ddp": "cpu_ddp", "zero1": "cpu_zero2", "zero2": "cpu_zero2", "zero3": "cpu_zero3", "fsdp2": "cpu_ddp"}
    config = yaml.safe_load(shipped_file(f"accelerate_configs/{shipped[backend]}.yaml").read_text())
    if backend == "zero1":
        config["deepspeed_config"]["zero_stage"] = 1
    elif backend == "zero3":
        deepspeed_file = folder / "deepspeed.json"
        deepspeed_file.write_text(json.dumps(SHARD_EVERYTHING))
        config["deepspeed_config"] = {"deepspeed_config_file": str(deepspeed_file), "zero3_init_flag": True}
        del config["mixed_precision"]  # says the DeepSpeed file
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture(scope="session")
def launched(shared: Path, models: Path, request: pytest.FixtureRequest) -> Callable[..., Run]:
    """`launched("zero3")` is the run of all cases under a backend; `launched("zero3", "resumed")` comes after it."""

    def run(backend: str, part: str = "") -> Run:
        if part:
            run(backend)
        elif backend != "one":
            run("one")  # draws the samples of the prior that all share
        if backend.startswith("zero"):
            request.getfixturevalue("deepspeed_is_built")
        first = shared / backend
        folder = first / part if part else first
        with once(folder) as is_first:
            log, code = folder / "log", folder / "returncode"
            if is_first:
                options = ["--backend", backend, "--models", models, "--out", first, "--seconds", "400"]
                script = [WORKER, *options, *(CASES[part] if part else CASES[backend])]
                config = write_config(backend, folder) if backend != "one" else None
                command = accelerate(config, *script) if config else [sys.executable, *map(str, script)]
                code.write_text(str(run_and_wait(command, log, seconds=420).returncode))
            if not code.exists():
                pytest.fail(f"the launch of {backend} {part} has failed before")
            return Run(first, Finished(int(code.read_text()), log), 1 if backend == "one" else 2)

    return run


# --- What tests take -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", params=SCRIPTED)
def scripted(request: pytest.FixtureRequest) -> str:
    """A case whose completions are the same for any number of processes."""
    return request.param


@pytest.fixture
def launch_line(tmp_path: Path) -> Callable[..., Finished]:
    """`accelerate launch --config_file CONFIG ARGUMENTS ...` in `tmp_path`, from where modules are imported too."""

    def launch(config_file: Path, *arguments: str) -> Finished:
        command = accelerate(config_file, *arguments)
        return run_and_wait(command, tmp_path / "log", 300, cwd=tmp_path, python_path=[str(tmp_path)])

    return launch
