"""f-TB: one off-policy loss for every divergence."""

import torch

from ..divergences import Divergence
from ..groups import Group
from .base import Estimator, Sequences
from .baselines import leave_one_out_mean


class TrajectoryBalance(Estimator):
    """
    The gradient of `E_q[L_f(log pi - log P + log Z)]` (https://huggingface.co/papers/2605.15417).

    On-policy it is that of `D_f(pi||p)`; with any other `q` that covers the posterior's support the minimum stays at
    `pi = p` if `log Z` is the true one.

    Args:
        divergence ([`~trl_bayes.divergences.Divergence`]): `f`.
        fits_log_z (`bool`, *optional*, defaults to `False`):
            Takes as `log Z` the constant that fits the siblings best ([`vargrad_log_z`]) instead of the partition's
            estimate. For reverse KL on-policy: elsewhere it is not the posterior's `log Z`.
    """

    def __init__(self, divergence: Divergence, fits_log_z: bool = False):
        super().__init__(divergence)
        self.fits_log_z = fits_log_z

    def choose_log_z(self, group: Group, estimate: torch.Tensor) -> torch.Tensor:
        return vargrad_log_z(group.log_policy - group.log_target, group.valid) if self.fits_log_z else estimate

    def log_z_of_value(self, group: Group, chosen: torch.Tensor, of_prompt: torch.Tensor) -> torch.Tensor:
        return chosen  # the loss itself, which is no divergence but where it is on-policy

    def pseudo_reward(self, sequences: Sequences) -> torch.Tensor:
        return -self.coefficient(sequences)

    def coefficient(self, sequences: Sequences) -> torch.Tensor:
        return self.divergence.loss_slope(sequences.log_density_ratio)

    def value(self, sequences: Sequences) -> torch.Tensor:
        return self.divergence.loss(sequences.log_density_ratio)


def vargrad_log_z(log_ratio: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """
    The constant that fits the siblings' squared log-ratio best: `argmin_C sum_{j != i} (log pi_j - log P_j + C)^2`.

    It is their mean of `log P - log pi`, a lower bound of `log Z` that is tight at the posterior. With it, trajectory
    balance has exactly the gradient of `KL(pi||p)` ([VarGrad](https://huggingface.co/papers/2010.10436)).

    Args:
        log_ratio (`torch.Tensor`): `log pi - log P` of shape `(P, G)`, finite.
        valid (`torch.Tensor`): boolean `(P, G)`.

    Returns:
        `torch.Tensor`: shape `(P, G)`.
    """
    return -leave_one_out_mean(log_ratio, valid)
