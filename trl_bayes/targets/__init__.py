"""Targets: which posterior to approximate. Each turns rewards into log-potential phi; none knows a trainer."""

from ..prior import Context, PriorScores, PromptTable, log_z_from_prior
from .base import LogPotentialError, Target
from .build import build_target
from .calibrated import Calibrated
from .chi_squared import ChiSquared
from .constraint import Constraint
from .contract import assert_target_contract
from .log_sigmoid import LogSigmoidCentered
from .moments import Moments
from .product import Product
from .tempered import Tempered
from .tilt import Tilt
from .transforms import (
    CalibratedLaw,
    Transform,
    best_of_n,
    beta_for_kl,
    calibrated_law,
    ctrl_best_of_n,
    ctrl_worst_of_n,
    identity,
    worst_of_n,
)


__all__ = [
    "Calibrated",
    "CalibratedLaw",
    "ChiSquared",
    "Constraint",
    "Context",
    "LogPotentialError",
    "LogSigmoidCentered",
    "Moments",
    "PriorScores",
    "Product",
    "PromptTable",
    "Target",
    "Tempered",
    "Tilt",
    "Transform",
    "assert_target_contract",
    "best_of_n",
    "beta_for_kl",
    "build_target",
    "calibrated_law",
    "ctrl_best_of_n",
    "ctrl_worst_of_n",
    "identity",
    "log_z_from_prior",
    "worst_of_n",
]
