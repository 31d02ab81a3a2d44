"""f-TB: one off-policy loss for every divergence to the posterior."""

import textwrap
from dataclasses import dataclass, field
from typing import cast

from ..divergences import DIVERGENCES
from ..estimators import Estimator, TrajectoryBalance
from ..partitions import PARTITIONS
from .off_policy_trainer import OffPolicyConfig, OffPolicyTrainer
from .posterior_config import DivergenceConfig, PosteriorConfig


@dataclass
class TrajectoryBalanceConfig(DivergenceConfig, OffPolicyConfig):
    r"""
    Configuration for the [`TrajectoryBalanceTrainer`].

    This class includes only the parameters that are specific to trajectory balance. For the others see
    [`OffPolicyConfig`], [`DivergenceConfig`], [`PosteriorConfig`] and [`~trl.GRPOConfig`].

    Parameters:
        divergence (`str`, *optional*, defaults to `"reverse_kl"`):
            Divergence whose f-TB loss is minimized; `reverse_kl` is the squared log-ratio (VarGrad).
        partition (`str`, *optional*, defaults to `"leave_one_out"`):
            How `log Z` is estimated; see [`TrajectoryBalanceTrainer`].
    """

    # Parameters whose default values are overridden
    partition: str = field(
        default="leave_one_out",
        metadata={
            "help": "How log Z is estimated: 'leave_one_out' (the siblings' importance weights; on-policy with "
            "reverse_kl their mean log-ratio), 'running' (importance weights of all visits to the prompt), "
            "'prior_samples' (samples of the prior, drawn before the first update) or 'known' (the target's own).",
            "choices": list(PARTITIONS),
        },
    )
    divergence: str = field(
        default="reverse_kl",
        metadata={"help": "Divergence whose f-TB loss is minimized.", "choices": list(DIVERGENCES)},
    )

    @property
    def fits_log_z(self) -> bool:
        """Whether `log Z` is fitted to the siblings (VarGrad), which is exact for reverse KL on-policy only."""
        return self.partition == "leave_one_out" and not self.reuses_samples and self.divergence == "reverse_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_fraction > 0 and self.partition == "leave_one_out" and not self.fits_log_z:
            raise ValueError(
                f"`prior_fraction={self.prior_fraction}` with `partition='leave_one_out'` moves the fixed point of "
                "trajectory balance: the error of a group's own log Z does not average out over completions of the "
                "prior, so set `partition` to 'running', 'prior_samples' or 'known'."
            )


class TrajectoryBalanceTrainer(OffPolicyTrainer):
    """
    Trainer for trajectory balance with any f-divergence, from f-TB (https://huggingface.co/papers/2605.15417) and
    [VarGrad](https://huggingface.co/papers/2010.10436).

    The only change with respect to [`~trl.GRPOTrainer`] is the loss. With `Delta = log pi - log P + log Z` the
    log-ratio to the posterior `p = P / Z`,

        loss = E_q[L_f(Delta)],        L_f(Delta) = integral_0^Delta (f'(e^s) - f'(1)) ds,

    which is `Delta^2 / 2` for `reverse_kl`. On-policy its gradient is that of `D_f(pi||p)`; with completions of any
    other policy `q` that covers the posterior's support its minimum stays at `pi = p`, without importance ratios or
    clipping, if `log Z` is the true one. So off-policy (replay, asynchronous sampling) use
    `partition="prior_samples"`, which is [A*-PO](https://huggingface.co/papers/2505.20686) for reverse KL: with `Z`
    from the group's own weights and completions of the prior the fixed point is off by KL(p||pi) = .22, .057 and .009
    at 4, 16 and 64 completions a group (letters); a running `Z`, or `q` near the posterior, makes that harmless. With
    a share of each group from the prior (`prior_fraction`) that `Z` is refused, but for the constant below.

    On-policy with `reverse_kl` and `partition="leave_one_out"`, `log Z` is the constant that fits the siblings best
    (VarGrad): the gradient is then exactly that of [`KLRLTrainer`]; with `prior_fraction` it is that of the variance
    of the log-ratio under the mixture, whose minimum is the posterior too. In all other cases it is the importance
    estimate, which does not go stale when completions are reused.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_bayes import TrajectoryBalanceConfig, TrajectoryBalanceTrainer

    >>> trainer = TrajectoryBalanceTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=TrajectoryBalanceConfig(output_dir="out", beta=0.1, replay_buffer_size=4096),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        args ([`TrajectoryBalanceConfig`], *optional*): Configuration.
        target ([`~trl_bayes.targets.Target`], *optional*): The posterior; defaults to `Tilt(beta=args.beta)`.

    All other arguments are those of [`~trl.GRPOTrainer`].
    """

    _tag_names = ["trl", "trl-bayes", "trajectory-balance"]
    _name = "Trajectory Balance"
    _paper = {
        "title": "VarGrad: A Low-Variance Gradient Estimator for Variational Inference",
        "id": "2010.10436",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{richter2020vargrad,
                title        = {{VarGrad: A Low-Variance Gradient Estimator for Variational Inference}},
                author       = {Lorenz Richter and Ayman Boustati and Nikolas N{\\"u}sken and Francisco J. R. Ruiz and {\\"O}mer Deniz Akyildiz},
                year         = 2020,
                booktitle    = {Advances in Neural Information Processing Systems},
                eprint       = {arXiv:2010.10436},
            }"""),  # noqa: E501
    }

    config_class = TrajectoryBalanceConfig
    args: TrajectoryBalanceConfig

    def make_estimator(self, args: PosteriorConfig) -> Estimator:
        return TrajectoryBalance(args.make_divergence(), fits_log_z=cast(TrajectoryBalanceConfig, args).fits_log_z)
