"""f-DPG: any f-divergence to the posterior, minimized with its own pseudo-reward."""

import textwrap
from dataclasses import dataclass

from ..estimators import Estimator, ScoreFunction
from .off_policy_trainer import OffPolicyConfig, OffPolicyTrainer
from .posterior_config import DivergenceConfig, PosteriorConfig


@dataclass
class FDPGConfig(DivergenceConfig, OffPolicyConfig):
    r"""
    Configuration for the [`FDPGTrainer`]: that of [`DivergenceConfig`], with Jensen-Shannon as the default, and that
    of [`OffPolicyConfig`].
    """


class FDPGTrainer(OffPolicyTrainer):
    """
    Trainer for f-DPG, from [Aligning Language Models with Preferences through f-divergence
    Minimization](https://huggingface.co/papers/2302.08215).

    The only change with respect to [`~trl.GRPOTrainer`] is the loss, an f-divergence between the policy and the
    posterior `p ∝ pi_0 exp(phi)`. With `t = pi/p` its gradient is

        grad D_f(pi||p) = E_pi[f'(t) grad log pi],

    a policy gradient with the pseudo-reward `-f'(t)` and its leave-one-out mean as baseline. Completions of another
    policy (`num_iterations` > 1, `replay_buffer_size`, `prior_fraction`, vLLM) are weighted by the sequence's ratio
    `pi/q`, unclipped.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_bayes import FDPGConfig, FDPGTrainer

    >>> trainer = FDPGTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     args=FDPGConfig(output_dir="out", divergence="jensen_shannon", beta=0.1),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        args ([`FDPGConfig`], *optional*): Configuration.
        target ([`~trl_bayes.targets.Target`], *optional*): The posterior; defaults to `Tilt(beta=args.beta)`.

    All other arguments are those of [`~trl.GRPOTrainer`].
    """

    _tag_names = ["trl", "trl-bayes", "f-dpg"]
    _name = "f-DPG"
    _paper = {
        "title": "Aligning Language Models with Preferences through f-divergence Minimization",
        "id": "2302.08215",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{go2023aligning,
                title        = {{Aligning Language Models with Preferences through f-divergence Minimization}},
                author       = {Dongyoung Go and Tomasz Korbak and Germ{\\`a}n Kruszewski and Jos Rozen and Nahyeon Ryu and Marc Dymetman},
                year         = 2023,
                booktitle    = {International Conference on Machine Learning},
                eprint       = {arXiv:2302.08215},
            }"""),  # noqa: E501
    }

    config_class = FDPGConfig

    def make_estimator(self, args: PosteriorConfig) -> Estimator:
        return ScoreFunction(args.make_divergence())
