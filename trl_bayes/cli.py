"""The command `trl-bayes`: finds the commands in `trl_bayes/commands/` and runs one of them.

A command is a module there with a function `main(argv)`; its name is the module's with dashes, and the first line of
its docstring is its help. They are found by reading the files, so that `trl-bayes --help` imports none of them.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .command_line.discovery import modules_with
from .command_line.refusals import refuse
from .spelling import did_you_mean


_FOLDER = Path(__file__).parent / "commands"


def main(argv: Sequence[str] | None = None) -> None:
    """
    Runs `trl-bayes COMMAND ...`.

    Args:
        argv (`Sequence[str]`, *optional*): command and its arguments; defaults to `sys.argv[1:]`.

    Raises:
        SystemExit: code 2 after one sentence on stderr, if there is no such command.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return
    if argv[0] == "--version":
        print(__version__)
        return
    name = argv[0].replace("_", "-")
    known = commands()
    if name not in known:
        hint = did_you_mean(name, known)
        refuse("trl-bayes", f"There is no command {argv[0]!r}{hint}: use one of {', '.join(known)}.")
    importlib.import_module(f".commands.{name.replace('-', '_')}", __package__).main(argv[1:])


def commands() -> dict[str, str]:
    """Names of the commands, in alphabetical order, with the first line of each one's docstring."""
    return modules_with("main", [_FOLDER])


def help_text() -> str:
    """What `trl-bayes --help` prints."""
    known = commands()
    width = max(map(len, known)) + 2
    return "\n".join(
        [
            "usage: trl-bayes COMMAND [ARGUMENT ...]",
            "",
            "Fine-tune a language model towards a posterior that you choose.",
            "",
            "commands:",
            *(f"  {name:<{width}}{summary}" for name, summary in known.items()),
            "",
            "`trl-bayes COMMAND --help` explains a command, `trl-bayes --version` prints the version.",
        ]
    )
