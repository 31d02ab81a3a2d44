"""DPG: forward KL to the posterior by importance weights, exact under reuse of samples."""

import textwrap
from dataclasses import dataclass

from ..divergences import Divergence, get_divergence
from ..estimators import Estimator, ImportanceWeights
from .off_policy_trainer import OffPolicyConfig, OffPolicyTrainer
from .posterior_config import PosteriorConfig


@dataclass
class DPGConfig(OffPolicyConfig):
    r"""
    Configuration for the [`DPGTrainer`]: that of [`OffPolicyConfig`].
    """

    def make_divergence(self) -> Divergence:
        return get_divergence("forward_kl")


class DPGTrainer(OffPolicyTrainer):
    """
    Trainer for distributional policy gradients, from [A Distributional Approach to Controlled Text
    Generation](https://huggingface.co/papers/2012.11635).

    The only change with respect to [`~trl.GRPOTrainer`] is the loss, the forward `KL(p||pi)` to the posterior
    `p ∝ pi_0 exp(phi)`. With completions from any policy `q` its gradient is

        grad KL(p||pi) = -E_q[(P / (q Z) - pi / q) grad log pi],        P = pi_0 exp(phi).

    The first weight does not depend on the policy that is trained, so a completion can be used for any number of
    updates (`num_iterations`) and from any recorded policy (`replay_buffer_size`), or a mixture of the policy and the
    prior (`prior_fraction`). The second is a baseline of zero mean. A completion outside the posterior's support only
    has the baseline, so hard constraints are fine: with [`~trl_bayes.targets.Constraint`] this learns the prior
    conditioned on an event.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_bayes import DPGConfig, DPGTrainer
    >>> from trl_bayes.targets import Constraint

    >>> trainer = DPGTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     target=Constraint(),
    ...     args=DPGConfig(output_dir="out", num_generations=16),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        args ([`DPGConfig`], *optional*): Configuration.
        target ([`~trl_bayes.targets.Target`], *optional*): The posterior; defaults to `Tilt(beta=args.beta)`.

    All other arguments are those of [`~trl.GRPOTrainer`].
    """

    _tag_names = ["trl", "trl-bayes", "dpg"]
    _name = "DPG"
    _paper = {
        "title": "A Distributional Approach to Controlled Text Generation",
        "id": "2012.11635",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{khalifa2021distributional,
                title        = {{A Distributional Approach to Controlled Text Generation}},
                author       = {Muhammad Khalifa and Hady Elsahar and Marc Dymetman},
                year         = 2021,
                booktitle    = {International Conference on Learning Representations},
                eprint       = {arXiv:2012.11635},
            }"""),
    }

    config_class = DPGConfig

    def make_estimator(self, args: PosteriorConfig) -> Estimator:
        return ImportanceWeights(args.make_divergence())
