"""Train by trajectory balance: off-policy, with any divergence to the posterior."""

from ..command_line.training import run
from ..trainers.trajectory_balance import TrajectoryBalanceTrainer


def main(argv: list[str] | None = None) -> None:
    """Trains by [`TrajectoryBalanceTrainer`] as the command line says."""
    run("tb", TrajectoryBalanceTrainer, argv, __doc__)


if __name__ == "__main__":
    main()
