"""XPO: which of two completions is preferred, as a loss of the policy; and its optimism about the prior's."""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from ..divergences import Divergence
from .policy_gradient import PolicyGradient


LOSS_TYPES = ("sigmoid", "ipo")


class PairTerms(NamedTuple):
    """What the loss needs of each of `M` pairs besides the policy: the policy's own completion and the prior's."""

    log_prior: torch.Tensor
    """`log pi_0` of both, the policy's completion first, `(M, 2)`, in nats."""
    preference: torch.Tensor
    """Probability that the policy's is preferred, `(M,)`: 1 or 0 where that is certain."""
    usable: torch.Tensor
    """Boolean `(M,)`: whether the pair counts. One that could not be compared does not."""


class PreferenceLoss:
    """
    The loss of XPO, for pairs of a completion `y` of the policy and one `y~` of the prior, of which `y` is preferred
    with probability `w`. See [Exploratory Preference Optimization](https://huggingface.co/papers/2405.21046).

        loss = E[l(m)] + alpha E[log pi(y~)],        m = log pi(y)/pi_0(y) - log pi(y~)/pi_0(y~)

    Here `l(m) = -w log sigmoid(beta m) - (1 - w) log sigmoid(-beta m)` for `"sigmoid"` (DPO), and
    `l(m) = w (m - 1/(2 beta))^2 + (1 - w) (m + 1/(2 beta))^2` for `"ipo"`: the mean over labels drawn with
    probability `w`, without their noise.

    With `alpha = 0`, `"sigmoid"` and `w = sigmoid(r(y) - r(y~))` (Bradley-Terry) the minimum is the tilt posterior
    `pi_0 exp(r / beta)`, whoever drew the pairs, as long as they cover all completions. Labels that are certain (the
    larger reward wins) have no finite minimum: the margin of each pair grows without bound. The bonus `alpha` has the
    gradient `alpha E_{pi_0}[grad log pi]`, which is 0 at the prior.

    Args:
        beta (`float`): temperature of the posterior, in units of reward per nat; for `"ipo"` its `tau`.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`): `"sigmoid"` or `"ipo"`.
    """

    def __init__(self, beta: float, loss_type: str = "sigmoid"):
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"Unknown `loss_type={loss_type!r}`: use one of {list(LOSS_TYPES)}.")
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"`beta={beta}` is not a temperature: set a positive number of reward per nat.")
        self.beta, self.loss_type = beta, loss_type

    def margin(self, log_policy: torch.Tensor, log_prior: torch.Tensor) -> torch.Tensor:
        """`m` of each pair, `(M,)` in nats, from `log pi` and `log pi_0` of both, `(M, 2)`."""
        log_ratio = log_policy - log_prior
        return log_ratio[:, 0] - log_ratio[:, 1]

    def preference_loss(self, margin: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
        """`l(m)` of each pair, `(M,)`: in nats for `"sigmoid"`, their square for `"ipo"`."""
        if self.loss_type == "sigmoid":
            m = self.beta * margin
            return -(preference * logsigmoid(m) + (1 - preference) * logsigmoid(-m))
        half = 1 / (2 * self.beta)
        return preference * (margin - half).square() + (1 - preference) * (margin + half).square()

    def slope(self, margin: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
        """`l'(m)` of each pair, `(M,)`."""
        if self.loss_type == "sigmoid":
            return self.beta * ((self.beta * margin).sigmoid() - preference)
        return 2 * margin - (2 * preference - 1) / self.beta

    def factors(self, log_policy: torch.Tensor, terms: PairTerms, alpha: float) -> torch.Tensor:
        """
        The factor of `grad log pi` of both completions of each pair, `(M, 2)`: `l'(m)` and `alpha - l'(m)`.

        Args:
            log_policy (`torch.Tensor`): `log pi` of both, `(M, 2)`, in nats.
            terms ([`PairTerms`]): of the same pairs.
            alpha (`float`): weight of the bonus.
        """
        slope = self.slope(self.margin(log_policy, terms.log_prior), terms.preference)
        return torch.stack([slope, alpha - slope], dim=1).masked_fill(~terms.usable.unsqueeze(1), 0.0)

    def losses(self, log_policy: torch.Tensor, terms: PairTerms, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Both parts of the loss, with their gradient: `l(m)` and `alpha log pi(y~)`, each `(M,)`.

        A pair that is not usable adds 0 to both. Arguments as of [`~PreferenceLoss.factors`].
        """
        margin = self.margin(log_policy, terms.log_prior)
        preferred = self.preference_loss(margin, terms.preference).masked_fill(~terms.usable, 0.0)
        return preferred, (alpha * log_policy[:, 1]).masked_fill(~terms.usable, 0.0)


def bradley_terry(rewards: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Probability that a completion is preferred to another: `sigmoid(r - r')`, of rewards of any shape."""
    return (rewards - others).sigmoid()


def larger_wins(rewards: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """1 where a completion has the larger reward, 0 where it has the smaller one, 1/2 where they tie."""
    return ((rewards - others).sign() + 1) / 2


class Preference(PolicyGradient):
    """
    Where a policy that learns from preferences stands, and in `pairwise` the loss by which it learns.

    What is estimated from a group is the distance `KL(pi||p)` to the tilt posterior of the rewards, the fixed point of
    a Bradley-Terry preference. The gradient is that of `pairwise`, which reads pairs and no groups.

    Args:
        divergence ([`~trl_bayes.divergences.Divergence`]): reverse KL.
        pairwise ([`PreferenceLoss`]): of the pairs.
    """

    learns_from_log_z = False

    def __init__(self, divergence: Divergence, pairwise: PreferenceLoss):
        super().__init__(divergence)
        self.pairwise = pairwise

    @property
    def objective(self) -> str:
        return f"the XPO loss of preferences (`{self.pairwise.loss_type}`)"
