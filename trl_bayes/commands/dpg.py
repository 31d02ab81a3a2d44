"""Train by DPG: forward KL to the posterior, for hard evidence and reused samples."""

from ..command_line.training import run
from ..trainers.dpg import DPGTrainer


def main(argv: list[str] | None = None) -> None:
    """Trains by [`DPGTrainer`] as the command line says."""
    run("dpg", DPGTrainer, argv, __doc__)


if __name__ == "__main__":
    main()
