"""What an estimator is: from what is known of completions to the factor of `grad log pi(y)` of each."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from ..divergences import Divergence
from ..groups import Group, finite_exp, pooled_log_z


class Sequences(NamedTuple):
    """Per-sequence quantities that an estimator reads, all of one shape, `(P, G)` or `(B,)`, in nats."""

    log_policy: torch.Tensor
    """`log pi(y)`, the current policy's."""
    log_target: torch.Tensor
    """`log P(y) = log pi_0(y) + phi(y)`; `-inf` outside the support."""
    log_proposal: torch.Tensor
    """`log q(y)`, of the distribution that `y` was sampled from."""
    log_z: torch.Tensor
    """`log Z(x)` that the completion is compared with."""
    baseline: torch.Tensor
    """The part of the pseudo-reward that does not depend on the completion itself."""

    @property
    def log_density_ratio(self) -> torch.Tensor:
        """`log t = log pi - log p`; `+inf` outside the posterior's support."""
        return self.log_policy - self.log_target + self.log_z

    @property
    def importance_ratio(self) -> torch.Tensor:
        """`pi / q`, at most the root of the largest float."""
        return finite_exp(self.log_policy - self.log_proposal)


class Estimator(ABC):
    """
    An estimator of the gradient of a divergence `D_f(pi||p)` from completions of any recorded proposal `q`.

    Each completion contributes `c_i grad log pi(y_i)`. A subclass says what `c_i` is
    ([`~Estimator.coefficient`]) and, where it needs one, the baseline. Nothing here gathers, logs or knows a model;
    functions of [`Sequences`] work elementwise on any shape, those of a [`~trl_bayes.groups.Group`] on `(P, G)`.

    Args:
        divergence ([`~trl_bayes.divergences.Divergence`]): `f`.
    """

    has_posterior: bool = True
    """Whether there is a prior and so a posterior, with a `Z` and distances to it; pure RL has none."""

    def __init__(self, divergence: Divergence):
        self.divergence = divergence

    @abstractmethod
    def coefficient(self, sequences: Sequences) -> torch.Tensor:
        """The factor `c_i` of `grad log pi(y_i)` in the gradient of the loss; no gradient flows through it."""

    def pseudo_reward(self, sequences: Sequences) -> torch.Tensor:
        """What a completion is worth, before the baseline: `-f'(t)` unless a subclass says otherwise."""
        return -self.divergence.slope(sequences.log_density_ratio)

    def baseline(self, group: Group, log_z: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
        """
        The baseline of each completion of a group, `(P, G)`; zero unless a subclass has one.

        Args:
            group ([`~trl_bayes.groups.Group`]): the completions.
            log_z (`torch.Tensor`): `log Z` that each is compared with, `(P, G)`.
            usable (`torch.Tensor`): boolean `(P, G)`, which of them count.
        """
        return torch.zeros_like(log_z)

    def reused_baseline(self, log_z: torch.Tensor) -> torch.Tensor:
        """
        The baseline of completions of earlier policies, `(B,)`: zero unless a subclass has one.

        Their siblings' mean is that of the policy of their own time. What all are worth at the posterior is known at
        any time, and with it the noise of a reused completion goes away as the policy comes near.

        Args:
            log_z (`torch.Tensor`): `log Z` that each is compared with, `(B,)`.
        """
        return torch.zeros_like(log_z)

    def value(self, sequences: Sequences) -> torch.Tensor:
        """What a completion adds to the logged loss: on average `D_f(pi||p)`, in nats."""
        return sequences.importance_ratio * self.divergence.f_over_t(sequences.log_density_ratio)

    def choose_log_z(self, group: Group, estimate: torch.Tensor) -> torch.Tensor:
        """
        `log Z` that each completion of a group is compared with, `(P, G)`.

        Args:
            group ([`~trl_bayes.groups.Group`]): the completions.
            estimate (`torch.Tensor`): what the partition says, `(P, G)`, from importance weights.
        """
        return estimate

    def log_z_of_value(self, group: Group, chosen: torch.Tensor, of_prompt: torch.Tensor) -> torch.Tensor:
        """
        `log Z` with which the divergence itself is measured, `(P, G)`: the prompt's, at least the group's mean weight.

        A divergence of distributions has bounds (Jensen-Shannon's is log 2) that a sum over ratios keeps only if these
        do not add up to more than one.

        Args:
            group ([`~trl_bayes.groups.Group`]): the completions.
            chosen (`torch.Tensor`): from [`~Estimator.choose_log_z`], `(P, G)`.
            of_prompt (`torch.Tensor`): the partition's best estimate, `(P,)`.
        """
        return torch.maximum(of_prompt, pooled_log_z(group.log_weights, group.valid)).unsqueeze(1).expand_as(chosen)

    def scaled_coefficient(self, sequences: Sequences) -> torch.Tensor:
        """That of `D_f / f''(1)`: all divergences pull equally hard near the posterior, as KL does."""
        return self.coefficient(sequences) / self.divergence.curvature
