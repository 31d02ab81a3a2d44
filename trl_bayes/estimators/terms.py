"""From a group to the terms of the loss, and from these to the loss: pure functions."""

from typing import NamedTuple

import torch

from ..groups import Group
from ..partitions import LogZ
from .base import Estimator, Sequences


class Terms(NamedTuple):
    """What the loss needs of each completion besides the policy itself, all of one shape, `(P, G)` or `(B,)`."""

    log_target: torch.Tensor
    """`log P`, in nats."""
    log_proposal: torch.Tensor
    """`log q`, in nats."""
    log_z: torch.Tensor
    """`log Z` that the completion is compared with; 0 where it is not usable."""
    log_z_of_value: torch.Tensor
    """`log Z` with which the divergence is measured, for the logged loss; 0 where the completion is not usable."""
    baseline: torch.Tensor
    """Of the pseudo-reward."""
    usable: torch.Tensor
    """Boolean: whether it counts. A completion without any reward, or of a prompt without evidence, does not."""
    advantages: torch.Tensor
    """Minus the factor of `grad log pi` at the time of sampling, for TRL's table of completions."""

    def sequences(self, log_policy: torch.Tensor) -> Sequences:
        """These terms beside `log pi` of a policy, of the same shape."""
        return Sequences(log_policy, self.log_target, self.log_proposal, self.log_z, self.baseline)


def group_terms(group: Group, log_z: LogZ, estimator: Estimator, cap: float | None = None) -> Terms:
    """
    The loss's terms of every completion of a group.

    Args:
        group ([`~trl_bayes.groups.Group`]): `(P, G)`.
        log_z ([`~trl_bayes.partitions.LogZ`]): what the partition says.
        estimator ([`Estimator`]): of the gradient.
        cap (`float`, *optional*): largest magnitude of a factor of `grad log pi`.

    Returns:
        [`Terms`]: each `(P, G)`.
    """
    chosen = estimator.choose_log_z(group, log_z.of_completion)
    usable = group.valid & chosen.isfinite()
    of_value = estimator.log_z_of_value(group, chosen, log_z.of_prompt).masked_fill(~usable, 0.0)
    chosen = chosen.masked_fill(~usable, 0.0)
    terms = Terms(
        log_target=group.log_target,
        log_proposal=group.log_proposal,
        log_z=chosen,
        log_z_of_value=of_value,
        baseline=estimator.baseline(group, chosen, usable),
        usable=usable,
        advantages=torch.zeros_like(chosen),
    )
    factor = capped(estimator.scaled_coefficient(terms.sequences(group.log_policy)), cap)
    return terms._replace(advantages=-factor.masked_fill(~usable, 0.0))


def sequence_loss(
    log_policy: torch.Tensor, terms: Terms, estimator: Estimator, cap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The value of the divergence with the gradient of the estimator.

    Args:
        log_policy (`torch.Tensor`): `log pi` of each completion with its gradient, `(B,)`.
        terms ([`Terms`]): of the same completions, `(B,)`.
        estimator ([`Estimator`]): of the gradient.
        cap (`float`, *optional*): largest magnitude of a factor of `grad log pi`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the loss, a scalar in nats to which completions that are not usable add
        nothing though they count in the mean; and on which completions the cap acts, boolean `(B,)`.
    """
    sequences = terms.sequences(log_policy.detach())
    exact = estimator.scaled_coefficient(sequences)
    factor = torch.where(terms.usable, capped(exact, cap), 0.0)
    value = estimator.value(sequences._replace(log_z=terms.log_z_of_value))
    value = torch.where(terms.usable & value.isfinite(), value, 0.0)
    loss = (value + factor * (log_policy - log_policy.detach())).mean()
    return loss, (factor != exact) & terms.usable


def capped(factor: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Factors of `grad log pi`, at most `cap` in magnitude."""
    return factor if cap is None else factor.clamp(-cap, cap)
