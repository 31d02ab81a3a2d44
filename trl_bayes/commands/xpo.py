"""Train by XPO: preferences between completions of the policy and of the prior."""

from ..command_line.training import run
from ..trainers.xpo import XPOTrainer


def main(argv: list[str] | None = None) -> None:
    """Trains by [`XPOTrainer`] as the command line says."""
    run("xpo", XPOTrainer, argv, __doc__)


if __name__ == "__main__":
    main()
