"""Run benchmarks where the truth is known: our trainers beside TRL's, samplers, the cost of a step."""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from .. import benchmarks
from ..command_line.discovery import modules_with
from ..command_line.refusals import one_sentence
from ..spelling import did_you_mean
from .env import environment


if TYPE_CHECKING:  # imported where they are used, so that the list of sections is quick
    from ..benchmarks.page import Page
    from ..benchmarks.section import SectionArguments

_PROGRAM = "trl-bayes bench"
_DEFAULT = ("exact", "embedded", "step")


def main(argv: Sequence[str] | None = None) -> None:
    """
    Runs sections, writes what they have found after each measurement, and prints it.

    Args:
        argv (`list[str]`, *optional*): sections and their flags; defaults to the command line.

    Raises:
        SystemExit: code 2 after one sentence on stderr, for bad input.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    names = list(takewhile(lambda word: not word.startswith("-"), argv))
    if not names and {"-h", "--help"} & set(argv):
        print(help_text())
        return
    with one_sentence(_PROGRAM, (ValueError,)):
        arguments = parse(names or _DEFAULT, argv[len(names) :])
        pages = pages_of(arguments)
    run(arguments, pages)


# ---------------------------------------------------------------------------------------------------------------------
# Sections and their flags


def sections() -> dict[str, str]:
    """Names of the sections, in alphabetical order, with the first line of each one's docstring."""
    return modules_with("run", benchmarks.__path__)


def help_text() -> str:
    """What `trl-bayes bench --help` prints."""
    known = sections()
    width = max(map(len, known)) + 2
    return "\n".join(
        [
            f"usage: {_PROGRAM} [SECTION ...] [--FLAG VALUE ...]",
            "",
            __doc__ or "",
            "",
            "sections:",
            *(f"  {name:<{width}}{summary}" for name, summary in known.items()),
            "",
            f"`{_PROGRAM} SECTION --help` lists the flags of a section. Of several sections a flag goes to each that",
            f"has it. No section stands for {', '.join(_DEFAULT)}: less than 40 minutes on two CPU cores.",
        ]
    )


def module_of(name: str) -> Any:
    """
    Imports the module of a section, which has a function `run(args, progress)`.

    Raises:
        ValueError: there is none; one sentence.
    """
    known = sections()
    if name not in known:
        raise ValueError(
            f"There is no section {name!r}{did_you_mean(name, known)}: the sections are {', '.join(known)}."
        )
    return importlib.import_module(f"{benchmarks.__name__}.{name.replace('-', '_')}")


def parse(names: Iterable[str], flags: Sequence[str]) -> "dict[str, SectionArguments]":
    """
    The arguments of each section. A flag goes to each that has it; where it is missing each has its own default.

    Raises:
        ValueError: no such section, or a value that it refuses; one sentence.
        SystemExit: for `--help`, and code 2 for a flag that none has or a value of the wrong type.
    """
    from transformers import HfArgumentParser

    names = list(dict.fromkeys(name.replace("_", "-") for name in names))
    kinds = {name: get_type_hints(module_of(name).run)["args"] for name in names}
    parser = HfArgumentParser(
        cast(Any, kinds.values()),
        prog=" ".join([_PROGRAM, *names]),
        description=" ".join(sections()[name] for name in names),
        conflict_handler="resolve",  # two sections may have one flag
        allow_abbrev=False,
    )
    nothing = {each.name: MISSING for kind in kinds.values() for each in fields(kind)}
    given = vars(parser.parse_args(list(flags), argparse.Namespace(**nothing)))
    found = {}
    for name, kind in kinds.items():
        own = {each.name: given[each.name] for each in fields(kind)}
        found[name] = kind(**{flag: value for flag, value in own.items() if value is not MISSING})
        found[name].check()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The run


def pages_of(arguments: "dict[str, SectionArguments]") -> "dict[str, Page]":
    """
    The page of each section; sections that are written to the same files share one.

    Raises:
        ValueError: an output folder cannot be written to; one sentence.
    """
    from ..benchmarks.page import Page, processor_name
    from ..command_line.folders import prepare_folder

    machine = {"processor": processor_name(), **environment()}
    pages: dict[tuple[str, str], Page] = {}
    for args in arguments.values():
        if (args.output_dir, args.page) not in pages:
            folder = prepare_folder(args.output_dir, overwrite=True)
            pages[args.output_dir, args.page] = Page(args.page, folder, machine)
    return {name: pages[args.output_dir, args.page] for name, args in arguments.items()}


def run(arguments: "dict[str, SectionArguments]", pages: "dict[str, Page]") -> None:
    """Runs the sections one after the other; of several processes only the first writes and prints."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    is_first = os.environ.get("RANK", "0") == "0"
    with Progress(*columns, console=console, disable=not is_first) as progress:
        for name, args in arguments.items():
            page = pages[name]
            start = time.perf_counter() - page.seconds
            for findings in module_of(name).run(args, progress):
                page.seconds = time.perf_counter() - start
                page.add(name, args, findings)
    for page in dict.fromkeys(page for page in pages.values() if page.findings):
        written = page.finish()
        print(page.to_markdown())
        console.print(f"Written to {page.folder}: {', '.join(written)}", soft_wrap=True)


if __name__ == "__main__":
    main()
