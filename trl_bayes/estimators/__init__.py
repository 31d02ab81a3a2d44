"""Estimators: from a weighted group to the factor of `grad log pi`; one file an estimator, pure functions."""

from .base import Estimator, Sequences, Terms
from .baselines import leave_one_out_baseline, leave_one_out_mean
from .importance_weights import ImportanceWeights
from .policy_gradient import PolicyGradient, PureRL
from .preference import LOSS_TYPES, PairTerms, Preference, PreferenceLoss, bradley_terry, larger_wins
from .score_function import ScoreFunction
from .trajectory_balance import TrajectoryBalance, vargrad_log_z


__all__ = [
    "LOSS_TYPES",
    "Estimator",
    "ImportanceWeights",
    "PairTerms",
    "PolicyGradient",
    "Preference",
    "PreferenceLoss",
    "PureRL",
    "ScoreFunction",
    "Sequences",
    "Terms",
    "TrajectoryBalance",
    "bradley_terry",
    "larger_wins",
    "leave_one_out_baseline",
    "leave_one_out_mean",
    "vargrad_log_z",
]
