"""Train calibrated targets on a task with all completions known, and compare their win rates with the formulas'."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import Progress
from transformers import HfArgumentParser

from ..benchmarks.calibrated_benchmark import Row, laws, run_law, to_markdown, write


@dataclass
class OracleTableArguments:
    r"""
    Arguments of the table.

    Args:
        max_steps (`int`, *optional*, defaults to `400`): updates of each training, of 256 completions each.
        seed (`int`, *optional*, defaults to `0`): of the training runs.
        output_dir (`str`, *optional*, defaults to `"runs/oracle_table"`): where `oracle.json` and `oracle.md` go.
    """

    max_steps: int = field(default=400, metadata={"help": "Updates of each training, of 256 completions each."})
    seed: int = field(default=0, metadata={"help": "Seed of the training runs."})
    output_dir: str = field(
        default="runs/oracle_table", metadata={"help": "Where oracle.json and oracle.md are written."}
    )

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"`max_steps={self.max_steps}` trains nothing: set it to 1 or more.")


def main(argv: list[str] | None = None) -> None:
    """Trains a policy for each law and prints the table."""
    parser = HfArgumentParser(cast(Any, OracleTableArguments), prog="trl-bayes oracle-table", description=__doc__)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another
    rows: list[Row] = []
    with Progress() as progress:
        for law in progress.track(laws(), description="training"):
            rows.append(run_law(law, max_steps=args.max_steps, seed=args.seed))
            write(rows, Path(args.output_dir))
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
