"""KL-RL: the reverse KL as a policy gradient, which needs no Z; and pure RL, its limit without a prior."""

import torch

from ..groups import Group
from .base import Estimator, Sequences
from .baselines import leave_one_out_mean


class PolicyGradient(Estimator):
    """
    The gradient of `KL(pi||p)` with the reward `phi - (log pi - log pi_0)` and its leave-one-out mean `b`:

        grad KL(pi||p) = -E_q[(pi/q) (log P - log pi - b) grad log pi].

    `Z` is the same for a whole group and cancels; a completion without siblings is compared with `log Z`, which is
    what all are worth at the posterior. See [RL with KL penalties is better viewed as Bayesian
    inference](https://huggingface.co/papers/2205.11275).
    """

    def pseudo_reward(self, sequences: Sequences) -> torch.Tensor:
        return sequences.log_target - sequences.log_policy

    def baseline(self, group: Group, log_z: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros_like(log_z)
        alone = Sequences(group.log_policy, group.log_target, group.log_proposal, log_z=log_z, baseline=zeros)
        return leave_one_out_mean(self.pseudo_reward(alone), usable & group.of_policy, log_z)


class PureRL(PolicyGradient):
    """
    The gradient of `-E_pi[phi]`: the largest reward, whatever it does to the language. There is no prior and no
    posterior, so `log P` is the log-potential alone, and the policy collapses.
    """

    has_posterior = False

    def baseline(self, group: Group, log_z: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
        return leave_one_out_mean(group.log_target, usable)

    def pseudo_reward(self, sequences: Sequences) -> torch.Tensor:
        return sequences.log_target

    def value(self, sequences: Sequences) -> torch.Tensor:
        return -sequences.importance_ratio * sequences.log_target
