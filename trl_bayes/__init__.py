"""
Fine-tune language models towards a posterior you choose: drop-in trainers for Hugging Face TRL.

Choose the target distribution ([`trl_bayes.targets`]), then choose how to approximate it (one of the trainers below).
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .trainers.ctrl import CTRLConfig, CTRLTrainer
    from .trainers.dpg import DPGConfig, DPGTrainer
    from .trainers.f_dpg import FDPGConfig, FDPGTrainer
    from .trainers.kl_rl import KLRLConfig, KLRLTrainer
    from .trainers.trajectory_balance import TrajectoryBalanceConfig, TrajectoryBalanceTrainer
    from .trainers.xpo import XPOTrainer
    from .trainers.xpo_config import XPOConfig

__version__ = "0.1.0"

_MODULE_OF = {
    "CTRLConfig": "ctrl",
    "CTRLTrainer": "ctrl",
    "DPGConfig": "dpg",
    "DPGTrainer": "dpg",
    "FDPGConfig": "f_dpg",
    "FDPGTrainer": "f_dpg",
    "KLRLConfig": "kl_rl",
    "KLRLTrainer": "kl_rl",
    "TrajectoryBalanceConfig": "trajectory_balance",
    "TrajectoryBalanceTrainer": "trajectory_balance",
    "XPOConfig": "xpo_config",
    "XPOTrainer": "xpo",
}

__all__ = [  # noqa: F822 - imported on first use, since TRL takes seconds to import
    "CTRLConfig",
    "CTRLTrainer",
    "DPGConfig",
    "DPGTrainer",
    "FDPGConfig",
    "FDPGTrainer",
    "KLRLConfig",
    "KLRLTrainer",
    "TrajectoryBalanceConfig",
    "TrajectoryBalanceTrainer",
    "XPOConfig",
    "XPOTrainer",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f".trainers.{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
