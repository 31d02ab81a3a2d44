"""Compare our trainers with TRL's on tasks whose posterior is known exactly."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import Progress
from transformers import HfArgumentParser

from ..diagnostics.exact_benchmark import Run, methods, problems, to_markdown, train, write


@dataclass
class BenchArguments:
    r"""
    Arguments of the benchmark.

    Args:
        problems (`list[str]`, *optional*): `letters`, `bigrams`, `balance`, `hard-20k`, `hard-100k`; all by default.
        seeds (`list[int]`, *optional*, defaults to `[0]`): seeds of the training runs.
        methods (`list[str]`, *optional*): parts of the names of the trainers to run; all by default.
        output_dir (`str`, *optional*, defaults to `"runs/bench"`): where `exact.json` and `exact.md` are written.
    """

    problems: list[str] = field(default_factory=lambda: list(problems()), metadata={"help": "Problems to run."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the training runs."})
    methods: list[str] = field(default_factory=list, metadata={"help": "Parts of the names of the trainers to run."})
    output_dir: str = field(default="runs/bench", metadata={"help": "Where exact.json and exact.md are written."})


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark and prints its table."""
    (args,) = HfArgumentParser(cast(Any, BenchArguments)).parse_args_into_dataclasses(argv)
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another
    known = problems()
    unknown = set(args.problems) - known.keys()
    if unknown:
        raise SystemExit(f"Unknown problems {sorted(unknown)}: use {sorted(known)}.")
    jobs = [
        (known[name], method, seed)
        for name in args.problems
        for method in methods(known[name])
        for seed in args.seeds
        if not args.methods or any(part in method.name for part in args.methods)
    ]
    runs: list[Run] = []
    with Progress() as progress:
        for problem, method, seed in progress.track(jobs, description="training"):
            runs.append(train(problem, method, seed=seed))
            write(runs, Path(args.output_dir))
    print(to_markdown(runs))


if __name__ == "__main__":
    main()
