"""Settings of XPO: how pairs are ordered, which of them an update sees, and the bonus."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

from ..divergences import Divergence, get_divergence
from ..estimators import LOSS_TYPES, PreferenceLoss
from ..partitions import FromPriorSamples
from .off_policy_trainer import OffPolicyConfig
from .posterior_config import NO_EFFECT
from .preference_trainer import ORDERINGS


@dataclass
class XPOConfig(OffPolicyConfig):
    r"""
    Configuration for the [`XPOTrainer`].

    This class includes only the parameters that are specific to XPO. For the others see [`OffPolicyConfig`],
    [`PosteriorConfig`] and [`~trl.GRPOConfig`]. `num_generations` is even: half of the completions of a prompt are the
    policy's, the others are taken from its `num_prior_samples` samples of the prior.

    Parameters:
        alpha (`float` or `list[float]`, *optional*, defaults to `1e-5`):
            Weight of the bonus `alpha log pi(y~)` on the prior's completions. Of a list each epoch takes the next one,
            and the last one stays.
        beta (`float`, *optional*, defaults to `0.1`):
            Temperature of the posterior, in units of reward per nat; for `loss_type="ipo"` its `tau`.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"` (DPO's) or `"ipo"`. GRPO's own are not accepted.
        ordering (`str`, *optional*, defaults to `"bradley_terry"`):
            How rewards order a pair. `"bradley_terry"`: the first is preferred with probability `sigmoid(r - r')`, and
            the loss is the mean over such labels; its fixed point is the posterior. `"larger_reward"`: the larger
            reward wins for certain, as in TRL 1.13; margins then grow without bound.
        missing_eos_penalty (`float`, *optional*):
            Subtracted from the reward of a completion that is cut at `max_completion_length`. Positive.
        replay_buffer_size (`int`, *optional*, defaults to `4096`):
            Number of past pairs that each process keeps. 0 learns from fresh pairs only.
        replay_ratio (`float`, *optional*, defaults to `1.0`):
            Past pairs added to a generated batch, per fresh one.
        partition (`str`, *optional*, defaults to `"prior_samples"`):
            How `Z(x)`, which is logged only, is found: the samples of the prior that XPO draws anyway tell it.
    """

    without_effect: ClassVar[tuple[str, ...]] = tuple(name for name in NO_EFFECT if name != "loss_type")

    # Parameters whose default values are overridden
    loss_type: str = field(
        default="sigmoid",
        metadata={"help": "Loss of a preference: 'sigmoid' (DPO's) or 'ipo'.", "choices": list(LOSS_TYPES)},
    )
    partition: str = field(
        default=FromPriorSamples.name,
        metadata={
            "help": "How Z(x), which is logged only, is found: from the samples of the prior, always.",
            "choices": [FromPriorSamples.name],
        },
    )
    replay_buffer_size: int = field(
        default=4096,
        metadata={"help": "Number of past pairs that each process keeps. 0 learns from fresh pairs only."},
    )
    replay_ratio: float = field(
        default=1.0, metadata={"help": "Past pairs added to a generated batch, per fresh one."}
    )

    # Parameters that control the preferences
    alpha: list[float] = field(
        default_factory=lambda: [1e-5],
        metadata={
            "help": "Weight of the bonus on the prior's completions: a number, or one for each epoch, of which the "
            "last one stays."
        },
    )
    ordering: str = field(
        default="bradley_terry",
        metadata={
            "help": "How rewards order a pair: 'bradley_terry' (with probability sigmoid(r - r'), so that the fixed "
            "point is the posterior) or 'larger_reward' (for certain).",
            "choices": list(ORDERINGS),
        },
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Subtracted from the reward of a completion that is cut at `max_completion_length`."},
    )

    def __post_init__(self) -> None:
        self.alpha = _as_list(self.alpha)
        self._check_unused()
        self._check_pairs()
        super().__post_init__()

    @property
    def keeps_text(self) -> str | None:
        return "XPO"

    def _check_unused(self) -> None:
        if self.pseudo_reward_cap is not None:
            raise ValueError(
                f"`pseudo_reward_cap={self.pseudo_reward_cap}` has no use here, where completions are compared and "
                "have no pseudo-reward: leave it unset."
            )
        if self.prior_fraction != 0:
            raise ValueError(
                f"`prior_fraction={self.prior_fraction}` has no use here, where every second completion is the "
                "prior's: leave `prior_fraction` at 0."
            )
        if self.partition != FromPriorSamples.name:
            raise ValueError(
                f"`partition={self.partition!r}` has no use here, where samples of the prior are drawn anyway: leave "
                "`partition` unset."
            )
        if self.target is not None:
            raise ValueError(
                "The posterior of XPO is the tilt of the rewards that order its pairs: leave `target` unset, or use "
                "KLRLTrainer for another."
            )

    def _check_pairs(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"`loss_type={self.loss_type!r}` is no loss of a preference: use one of {list(LOSS_TYPES)} (GRPO's "
                "own losses are for its own trainer)."
            )
        if self.ordering not in ORDERINGS:
            raise ValueError(f"Unknown `ordering={self.ordering!r}`: use one of {list(ORDERINGS)}.")
        if not isinstance(self.beta, Real):
            raise ValueError(
                f"`beta={self.beta!r}` must be one number: it is the temperature of the posterior, which is the same "
                "in all epochs."
            )
        penalty = self.missing_eos_penalty
        if penalty is not None and not (isinstance(penalty, Real) and 0 < float(penalty) < math.inf):
            raise ValueError(
                f"`missing_eos_penalty={penalty!r}` must be a positive number: it is subtracted from the reward."
            )
        if self.mask_truncated_completions:
            raise ValueError(
                "`mask_truncated_completions=True` would leave out one completion of a pair: set it to false, and "
                "`missing_eos_penalty` to what a cut completion costs."
            )
        names = ["num_generations", "num_generations_eval", "per_device_train_batch_size"]
        if self.eval_strategy != "no":
            names.append("per_device_eval_batch_size")
        for name in names:
            if (value := getattr(self, name)) is not None and value % 2:
                raise ValueError(
                    f"`{name}={value}` is odd, and XPO compares each completion of the policy with one of the prior: "
                    "set an even number."
                )

    @property
    def num_replayed(self) -> int:
        """Past pairs per generated batch and process: a multiple of `steps_per_generation`."""
        per_step = round(self.replay_ratio * self.per_device_train_batch_size / 2)
        return max(per_step, 1) * (self.steps_per_generation or 1)

    def alpha_of(self, epoch: float) -> float:
        """The weight of the bonus at a (fractional) epoch."""
        return self.alpha[min(int(epoch), len(self.alpha) - 1)]

    def make_divergence(self) -> Divergence:
        """Reverse KL to the tilt posterior: what is logged, and not what is minimized."""
        return get_divergence("reverse_kl")

    def make_loss(self) -> PreferenceLoss:
        """The loss of a pair."""
        return PreferenceLoss(self.beta, self.loss_type)


def _as_list(alpha: Any) -> list[float]:
    """One weight for each epoch, from a number or several."""
    values = list(alpha) if isinstance(alpha, Sequence) and not isinstance(alpha, str) else [alpha]
    if not values or not all(isinstance(value, Real) and 0 <= float(value) < math.inf for value in values):
        raise ValueError(f"`alpha={alpha!r}` must be a number of 0 or more, or a list with one for each epoch.")
    return [float(value) for value in values]
