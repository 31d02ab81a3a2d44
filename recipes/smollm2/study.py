"""Trains every method of a task with several seeds, measures all against the exact posterior, writes table and figure.

    python recipes/smollm2/study.py json                     # everything, one process at a time
    python recipes/smollm2/study.py json --seeds 0 1 2 --jobs 8
    python recipes/smollm2/study.py json --only DPG --parts train measure

What is there already is not made again, so a study that was stopped goes on. Methods are in `TASK/methods.yaml`.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml


HERE = Path(__file__).parent
PROGRAMS = {"python": [sys.executable], "trl-bayes": [sys.executable, "-m", "trl_bayes"]}


def slug(name: str) -> str:
    """A method's name as part of a path."""
    return re.sub(r"\W+", "_", name).strip("_").lower()


def call(command: list[str], log: Path) -> None:
    """
    Runs a command, its output in a file.

    Raises:
        SystemExit: it failed; the message says where its output is.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
            raise SystemExit(f"This failed, see {log}:\n{shlex.join(command)}")


def train(method: str, command: str, seed: int, runs: Path, flags: list[str]) -> None:
    """Trains a method with a seed, unless that is done."""
    folder = runs / f"{slug(method)}_{seed}"
    if (folder / "trainer_state.json").exists():
        return
    program, *rest = shlex.split(command)
    call(
        [*PROGRAMS[program], *rest, "--output_dir", str(folder), "--seed", str(seed), "--overwrite", *flags],
        runs / "logs" / f"{folder.name}.log",
    )
    print(f"trained {folder.name}", flush=True)


def measure(name: str, policies: dict[str, Path], split: str, args: argparse.Namespace, task: dict[str, Any]) -> None:
    """Measures some policies on the prompts of a split, unless that is done."""
    runs, folder = args.runs, args.runs / f"measured_{split}" / name
    if (folder / "evaluation.json").exists():
        return
    data = HERE / args.task / f"{split}.jsonl"
    command = [*PROGRAMS["trl-bayes"], "evaluate", "--config", task["reference"], "--dataset_name", str(data)]
    command += ["--policies", *(f"{run}={path}" for run, path in policies.items())]
    command += ["--num_samples", str(args.num_samples), "--num_reference_samples", str(args.num_reference_samples)]
    command += ["--prior_samples_dir", str(runs / f"prior_{split}"), "--save_samples", "--overwrite"]
    command += ["--pass_at", "1", "--output_dir", str(folder)]
    call(command, runs / "logs" / f"measured_{split}_{name}.log")
    print(f"measured {name} on {split}", flush=True)


def draw_prior(split: str, args: argparse.Namespace, task: dict[str, Any]) -> None:
    """Draws the samples of the prior that all measurements of a split share; the prior stands in for a policy."""
    prior = yaml.safe_load(Path(task["reference"]).read_text(encoding="utf-8"))["model_name_or_path"]
    measure("prior", {"prior_itself": Path(prior)}, split, args, task)


def finished(work: list[Future[None]]) -> None:
    """Waits for all, and raises what one of them raised."""
    for each in work:
        each.result()


def main() -> None:
    """Reads the command line and does what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(path.parent.name for path in HERE.glob("*/methods.yaml")))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--parts", nargs="+", default=["train", "measure", "report"])
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; several share a GPU")
    parser.add_argument("--runs", type=Path, help="default: runs/smollm2/TASK")
    parser.add_argument("--num_samples", type=int, default=50, help="of each policy and prompt")
    parser.add_argument("--num_reference_samples", type=int, default=1000, help="of the prior and prompt")
    args, flags = parser.parse_known_args()
    args.runs = args.runs or Path("runs/smollm2") / args.task
    task = yaml.safe_load((HERE / args.task / "methods.yaml").read_text(encoding="utf-8"))
    methods = {name: line for name, line in task["methods"].items() if not args.only or name in args.only}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    splits = [split for split in ("train", "held_out") if (HERE / args.task / f"{split}.jsonl").exists()]
    with ThreadPoolExecutor(args.jobs) as pool:
        priors = [pool.submit(draw_prior, split, args, task) for split in splits if "measure" in args.parts]
        if "train" in args.parts:
            todo = [(name, line, seed) for seed in args.seeds for name, line in methods.items()]
            list(pool.map(lambda each: train(*each, args.runs, flags), todo))
        finished(priors)
        if "measure" in args.parts:
            groups = {slug(name): [f"{slug(name)}_{seed}" for seed in args.seeds] for name in methods}
            work = [
                pool.submit(measure, name, {run: args.runs / run for run in runs}, split, args, task)
                for split in splits
                for name, runs in groups.items()
            ]
            finished(work)
    if "report" in args.parts:
        from report import write_report

        write_report(args.runs, list(methods), splits, args.seeds, HERE / args.task, task)


if __name__ == "__main__":
    main()
