"""Show the error of every sampler against its cost, on a task with all completions known."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import HfArgumentParser

from ..benchmarks.sampler_benchmark import BETA, COLUMNS, Row, cells, load_problem, run_all, write
from ..language_models.settings import at_least


@dataclass
class SamplerTableArguments:
    r"""
    Arguments of the table.

    Args:
        num_samples (`int`, *optional*, defaults to `2500`): draws of each of the two prompts.
        seed (`int`, *optional*, defaults to `0`): of all draws.
        output_dir (`str`, *optional*, defaults to `"runs/sampler_table"`): where `samplers.json` and `.md` go.
    """

    num_samples: int = field(default=2500, metadata={"help": "Draws of each of the two prompts."})
    seed: int = field(default=0, metadata={"help": "Seed of all draws."})
    output_dir: str = field(
        default="runs/sampler_table", metadata={"help": "Where samplers.json and samplers.md are written."}
    )

    def __post_init__(self) -> None:
        at_least("num_samples", self.num_samples)
        at_least("seed", self.seed, 0)


def main(argv: list[str] | None = None) -> None:
    """Samples by every method, writes and prints the table."""
    parser = HfArgumentParser(cast(Any, SamplerTableArguments), prog="trl-bayes sampler-table", description=__doc__)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        problem = load_problem(folder)
        rows = run_all(
            problem, args.num_samples, args.seed, lambda every: progress.track(every, description="sampling")
        )
    about = {
        "completions": problem.log_posterior.size(1),
        "prompts": list(problem.task.prompts),
        "beta": BETA,
        "seed": args.seed,
    }
    write(rows, Path(args.output_dir), about)
    Console().print(table(rows))


def table(rows: list[Row]) -> Table:
    """For the terminal."""
    shown = Table(title="Total variation to the exact posterior, and what a draw costs")
    for place, name in enumerate(COLUMNS):
        shown.add_column(name, justify="left" if place < 2 else "right")
    for number, row in enumerate(rows):
        last = number + 1 == len(rows) or rows[number + 1].family != row.family
        shown.add_row(*cells(row), end_section=last)
    return shown


if __name__ == "__main__":
    main()
