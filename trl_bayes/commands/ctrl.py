"""Train by InfAlign-CTRL: for policies of which the best, or the worst, of N completions counts."""

from ..command_line.training import run
from ..trainers.ctrl import CTRLTrainer


def main(argv: list[str] | None = None) -> None:
    """Trains by [`CTRLTrainer`] as the command line says."""
    run("ctrl", CTRLTrainer, argv, __doc__)


if __name__ == "__main__":
    main()
