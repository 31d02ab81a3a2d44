"""f-DPG: the score-function gradient of any f-divergence, with a leave-one-out baseline."""

import torch

from ..groups import Group
from .base import Estimator
from .baselines import leave_one_out_baseline


class ScoreFunction(Estimator):
    """
    The policy gradient of `D_f(pi||p)` with the pseudo-reward `-f'(t)`, `t = pi/p`:

        grad D_f(pi||p) = E_q[(pi/q) (f'(t) + b) grad log pi].

    `b` is a baseline of the pseudo-reward, so the factor is minus the centered pseudo-reward times the importance
    ratio. See [Aligning Language Models with Preferences through f-divergence
    Minimization](https://huggingface.co/papers/2302.08215).
    """

    def baseline(self, group: Group, log_z: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
        siblings = usable & group.of_policy  # whose mean is the same for a completion of the policy and of the prior
        return leave_one_out_baseline(group.log_policy - group.log_target, log_z, siblings, self.divergence)

    def reused_baseline(self, log_z: torch.Tensor) -> torch.Tensor:
        return torch.full_like(log_z, -self.divergence.slope_at_one)
