"""What an estimator is: from a group of completions to the terms of the loss, and from these to the loss."""

from typing import NamedTuple

import torch

from ..divergences import Divergence
from ..groups import Group, finite_exp, pooled_log_z
from ..partitions import LogZ


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


class Estimator:
    """
    An estimator of the gradient of a divergence `D_f(pi||p)` from completions of any recorded proposal `q`.

    Each completion contributes `c_i grad log pi(y_i)`. A subclass says what a completion is worth
    ([`~Estimator.pseudo_reward`]) and, where it needs one, the baseline, or what `c_i` is
    ([`~Estimator.coefficient`]). A trainer asks for the loss's terms of a group
    ([`~Estimator.terms`]) and then, for any part of them, for the loss ([`~Estimator.loss`]). Nothing here gathers,
    logs or knows a model; functions of [`Sequences`] work elementwise on any shape, those of a
    [`~trl_bayes.groups.Group`] on `(P, G)`.

    Args:
        divergence ([`~trl_bayes.divergences.Divergence`]): `f`.
    """

    has_posterior: bool = True
    """Whether there is a prior and so a posterior, with a `Z` and distances to it; pure RL has none."""

    learns_from_log_z: bool = True
    """Whether the gradient may depend on `Z`, and not only what is logged."""

    def __init__(self, divergence: Divergence):
        self.divergence = divergence

    @property
    def objective(self) -> str:
        """What is minimized, in words."""
        return f"the divergence `{self.divergence.name}`"

    def coefficient(self, sequences: Sequences) -> torch.Tensor:
        """
        The factor `c_i` of `grad log pi(y_i)` in the gradient of the loss; no gradient flows through it.

        Minus the centered pseudo-reward times `pi/q`, unless a subclass says otherwise.
        """
        return -sequences.importance_ratio * (self.pseudo_reward(sequences) - sequences.baseline)

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

    def terms(self, group: Group, log_z: LogZ, cap: float | None = None) -> Terms:
        """
        The loss's terms of every completion of a group, each `(P, G)`.

        Args:
            group ([`~trl_bayes.groups.Group`]): `(P, G)`.
            log_z ([`~trl_bayes.partitions.LogZ`]): what the partition says.
            cap (`float`, *optional*): largest magnitude of a factor of `grad log pi`.
        """
        chosen = self.choose_log_z(group, log_z.of_completion)
        usable = group.valid & chosen.isfinite()
        of_value = self.log_z_of_value(group, chosen, log_z.of_prompt).masked_fill(~usable, 0.0)
        chosen = chosen.masked_fill(~usable, 0.0)
        terms = Terms(
            log_target=group.log_target,
            log_proposal=group.log_proposal,
            log_z=chosen,
            log_z_of_value=of_value,
            baseline=self.baseline(group, chosen, usable),
            usable=usable,
            advantages=torch.zeros_like(chosen),
        )
        factor = capped(self.scaled_coefficient(terms.sequences(group.log_policy)), cap)
        return terms._replace(advantages=-factor.masked_fill(~usable, 0.0))

    def loss(
        self, log_policy: torch.Tensor, terms: Terms, cap: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The value of the divergence with the gradient of the estimator.

        Args:
            log_policy (`torch.Tensor`): `log pi` of each completion with its gradient, `(B,)`.
            terms ([`Terms`]): of the same completions, `(B,)`.
            cap (`float`, *optional*): largest magnitude of a factor of `grad log pi`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the loss, a scalar in nats to which completions that are not usable
            add nothing though they count in the mean; and on which completions the cap acts, boolean `(B,)`.
        """
        sequences = terms.sequences(log_policy.detach())
        exact = self.scaled_coefficient(sequences)
        factor = torch.where(terms.usable, capped(exact, cap), 0.0)
        value = self.value(sequences._replace(log_z=terms.log_z_of_value))
        value = torch.where(terms.usable & value.isfinite(), value, 0.0)
        loss = (value + factor * (log_policy - log_policy.detach())).mean()
        return loss, (factor != exact) & terms.usable


def capped(factor: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Factors of `grad log pi`, at most `cap` in magnitude."""
    return factor if cap is None else factor.clamp(-cap, cap)
