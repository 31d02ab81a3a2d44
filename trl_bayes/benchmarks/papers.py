"""Figures of the papers behind the package, on tasks where numbers are exact, from the scripts in recipes/papers."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.progress import Progress

from ..statistics.strict_json import strict_json
from .jobs import quiet
from .paper import Setting, Shown, load, scripts
from .section import Findings, SectionArguments, check_words


FIGURE, TABLE, RECORD = "figure.png", "table.md", "table.json"


@dataclass
class PapersArguments(SectionArguments):
    r"""
    Arguments of the section.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"runs/papers"`): where a folder of each figure goes, with
            `figure.png`, `table.md` and `table.json`; and `papers.md`, `papers.json` with all of them.
        figures (`list[str]`, *optional*): folders of `recipes/papers`; all by default.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2, 3, 4]`): of priors, noise and trainings.
        num_parallel (`int`, *optional*, defaults to `2`): trainings at the same time, each in a process of its own.
        quick (`bool`, *optional*, defaults to `False`): try everything and measure nothing well.
    """

    page: ClassVar[str] = "papers"

    output_dir: str = field(default="runs/papers", metadata={"help": "Where a folder of each figure goes."})
    figures: list[str] = field(
        default_factory=list, metadata={"help": f"Which: {', '.join(scripts())}. All if empty."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Seeds of priors, noise and trainings."}
    )
    num_parallel: int = field(default=2, metadata={"help": "Trainings at the same time, each on one CPU thread."})
    quick: bool = field(default=False, metadata={"help": "Try everything, and measure nothing well."})

    def __post_init__(self) -> None:
        check_words("figures", self.figures, tuple(scripts()))
        if self.num_parallel < 1:
            raise ValueError(f"`num_parallel={self.num_parallel}` runs nothing: set it to 1 or more.")
        if not self.seeds or any(not 0 <= seed < 2**32 - 1 for seed in self.seeds):
            raise ValueError(f"`seeds` needs numbers between 0 and 2^32 - 2, got {self.seeds}.")
        self.seeds = list(dict.fromkeys(self.seeds))


def run(args: PapersArguments, progress: Progress) -> Iterator[Findings]:
    """Makes one figure after the other, and writes each into a folder of its own."""
    quiet()
    found: dict[str, Any] = {}
    parts = ["## Figures of the papers"]
    chosen = args.figures or list(scripts())
    for name in progress.track(list(dict.fromkeys(chosen)), description="figures"):
        script, start = scripts()[name], time.perf_counter()
        setting = Setting(tuple(args.seeds), args.quick, args.num_parallel, progress, script)
        shown = load(script).experiment(setting)
        seconds = round(time.perf_counter() - start, 1)
        found[name] = write(Path(args.output_dir).expanduser() / name, shown, args.seeds, seconds)
        parts += [f"### {name}", shown.markdown, f"![{name}]({name}/{FIGURE})"]
        yield Findings(found, "\n\n".join(parts))


def write(folder: Path, shown: Shown, seeds: list[int], seconds: float) -> dict[str, Any]:
    """The files of one figure; returns what `table.json` holds."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"seeds": seeds, "seconds": seconds, **strict_json(shown.record, digits=6)}
    (folder / FIGURE).write_bytes(shown.figure)
    (folder / TABLE).write_text(shown.markdown + "\n", encoding="utf-8")
    (folder / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return record
