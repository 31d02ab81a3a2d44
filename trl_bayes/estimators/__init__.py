"""Estimators: from a weighted group to the factor of `grad log pi`; one file an estimator, pure functions."""

from .base import Estimator, Sequences, Terms
from .baselines import leave_one_out_baseline, leave_one_out_mean
from .importance_weights import ImportanceWeights, importance_coefficient
from .policy_gradient import PolicyGradient, PureRL
from .preference import LOSS_TYPES, PairTerms, Preference, PreferenceLoss, bradley_terry, larger_wins
from .score_function import ScoreFunction, score_function_coefficient
from .trajectory_balance import TrajectoryBalance, trajectory_balance_coefficient, vargrad_log_z


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
    "importance_coefficient",
    "larger_wins",
    "leave_one_out_baseline",
    "leave_one_out_mean",
    "score_function_coefficient",
    "trajectory_balance_coefficient",
    "vargrad_log_z",
]
