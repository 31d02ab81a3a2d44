"""Train by KL-RL: reinforcement learning with a KL penalty, and its exact optimum."""

from ..command_line.training import run
from ..trainers.kl_rl import KLRLTrainer


def main(argv: list[str] | None = None) -> None:
    """Trains by [`KLRLTrainer`] as the command line says."""
    run("kl-rl", KLRLTrainer, argv, __doc__)


if __name__ == "__main__":
    main()
