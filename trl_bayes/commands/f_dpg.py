"""Train by f-DPG: any divergence to the posterior, Jensen-Shannon by default."""

from ..command_line.training import run
from ..trainers.f_dpg import FDPGTrainer


def main(argv: list[str] | None = None) -> None:
    """Trains by [`FDPGTrainer`] as the command line says."""
    run("f-dpg", FDPGTrainer, argv, __doc__)


if __name__ == "__main__":
    main()
