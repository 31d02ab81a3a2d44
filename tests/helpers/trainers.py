"""Our trainers in one table, and what every tiny run is configured with."""

from collections.abc import Callable
from typing import Any, NamedTuple

from trl_bayes import (
    CTRLConfig,
    CTRLTrainer,
    DPGConfig,
    DPGTrainer,
    FDPGConfig,
    FDPGTrainer,
    KLRLConfig,
    KLRLTrainer,
    TrajectoryBalanceConfig,
    TrajectoryBalanceTrainer,
    XPOConfig,
    XPOTrainer,
)
from trl_bayes.divergences import DIVERGENCES


class Row(NamedTuple):
    """A trainer, its configuration, and what it can do that not all of them can."""

    trainer: Callable[..., Any]
    config: Callable[..., Any]
    divergences: tuple[str, ...]  # one that is its own, or all from which its `divergence` chooses
    takes_target: bool = True  # else it makes its own
    replays: bool = False  # completions of earlier policies, `replay_buffer_size`
    allows_pure_rl: bool = False  # `beta=0`
    further: tuple[str, ...] = ()  # arguments of the constructor that no other trainer has

    @property
    def chooses_divergence(self) -> bool:
        return len(self.divergences) > 1


# By the command that trains them, with underscores
TRAINERS: dict[str, Row] = {
    "kl_rl": Row(KLRLTrainer, KLRLConfig, ("reverse_kl",), allows_pure_rl=True),
    "f_dpg": Row(FDPGTrainer, FDPGConfig, DIVERGENCES, replays=True),
    "dpg": Row(DPGTrainer, DPGConfig, ("forward_kl",), replays=True),
    "tb": Row(TrajectoryBalanceTrainer, TrajectoryBalanceConfig, DIVERGENCES, replays=True),
    "ctrl": Row(CTRLTrainer, CTRLConfig, ("reverse_kl",), takes_target=False),
    "xpo": Row(XPOTrainer, XPOConfig, ("reverse_kl",), takes_target=False, further=("judge",)),
}


def having(condition: Callable[[Row], bool]) -> list[str]:
    """Names of the trainers of which something is true: `having(lambda row: row.replays)`."""
    return [name for name, row in TRAINERS.items() if condition(row)]


# CTRL is KL-RL with a target of its own: what is tested of the others' loss and of a run holds for it as well. XPO
# learns from pairs, by another loss, and has tests of its own
ANY_TARGET = having(lambda row: row.takes_target)

# A short run of a tiny model on the CPU that keeps nothing but its logs
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
}
