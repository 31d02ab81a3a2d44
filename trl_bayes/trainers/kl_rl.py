"""KL-RL: variational inference of the posterior, i.e. reinforcement learning with a KL penalty."""

import textwrap
from dataclasses import dataclass
from typing import ClassVar

from ..divergences import Divergence, get_divergence
from ..estimators import Estimator, PolicyGradient, PureRL
from .posterior_config import PosteriorConfig
from .posterior_trainer import PosteriorTrainer


@dataclass
class KLRLConfig(PosteriorConfig):
    r"""
    Configuration for the [`KLRLTrainer`]: that of [`PosteriorConfig`], with `beta=0.0` allowed (pure RL).
    """

    allows_zero_beta: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta == 0 and (self.target is not None or self.prior_model_name_or_path is not None):
            raise ValueError(
                "`beta=0` is pure RL, which has neither a target nor a prior: leave `target` and "
                "`prior_model_name_or_path` unset, or set `beta` > 0."
            )

    def make_divergence(self) -> Divergence:
        return get_divergence("reverse_kl")


class KLRLTrainer(PosteriorTrainer):
    """
    Trainer for reinforcement learning with a KL penalty, seen as inference: [RL with KL penalties is better viewed as
    Bayesian inference](https://huggingface.co/papers/2205.11275).

    The only change with respect to [`~trl.GRPOTrainer`] is the loss, `KL(pi||p)` to the posterior
    `p ∝ pi_0 exp(phi)`; with `phi = r / beta` this is maximizing `E[r] - beta KL(pi||pi_0)`. Its gradient is

        grad KL(pi||p) = -E_pi[(phi - (log pi - log pi_0) - b) grad log pi],

    with the leave-one-out mean of the group as `b`. `Z` is the same for a whole group and cancels. The
    advantages are those of RLOO divided by `beta`: exact at the sequence level, without standard-deviation scaling,
    token normalization or clipping. `beta=0` gives pure RL, the baseline that collapses.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_bayes import KLRLConfig, KLRLTrainer

    >>> trainer = KLRLTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=KLRLConfig(output_dir="out", beta=0.1),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        args ([`KLRLConfig`], *optional*): Configuration.
        target ([`~trl_bayes.targets.Target`], *optional*): The posterior; defaults to `Tilt(beta=args.beta)`.

    All other arguments are those of [`~trl.GRPOTrainer`].
    """

    _tag_names = ["trl", "trl-bayes", "kl-rl"]
    _name = "KL-RL"
    _paper = {
        "title": "RL with KL penalties is better viewed as Bayesian inference",
        "id": "2205.11275",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{korbak2022rl,
                title        = {{RL with KL penalties is better viewed as Bayesian inference}},
                author       = {Tomasz Korbak and Ethan Perez and Christopher L. Buckley},
                year         = 2022,
                booktitle    = {Findings of the Association for Computational Linguistics: EMNLP 2022},
                eprint       = {arXiv:2205.11275},
            }"""),
    }

    config_class = KLRLConfig

    def make_estimator(self, args: PosteriorConfig) -> Estimator:
        return (PolicyGradient if args.beta != 0 else PureRL)(args.make_divergence())
