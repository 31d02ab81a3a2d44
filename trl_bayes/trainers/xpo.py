"""XPO: preferences between the policy's completions and the prior's, with a bonus that is meant to explore."""

import textwrap
from typing import cast

from ..estimators import Estimator, Preference
from .off_policy_trainer import OffPolicyTrainer
from .posterior_config import PosteriorConfig
from .preference_trainer import PreferenceTrainer
from .xpo_config import XPOConfig


class XPOTrainer(OffPolicyTrainer, PreferenceTrainer):
    r"""
    Trainer for XPO, from [Exploratory Preference Optimization](https://huggingface.co/papers/2405.21046).

    The changes with respect to [`~trl.GRPOTrainer`] are the loss, and that every second completion of a prompt is the
    prior's. For pairs of a completion `y` of the policy and one `y~` of the prior, `y+` the preferred one of the two,

        loss = alpha log pi(y~) - log sigmoid(beta log pi(y+)/pi_0(y+) - beta log pi(y-)/pi_0(y-))

    averaged over fresh pairs and a sample of all earlier ones (`replay_buffer_size`), as in the paper's steps 5 and 6.
    With `alpha=0` and the default ordering by `sigmoid(r - r')` the fixed point is the posterior
    `p ∝ pi_0 exp(r / beta)`; `alpha` moves it away from the prior's completions.

    The prior's completions are drawn before the first update, while the policy is the prior, `num_prior_samples` for
    each prompt, and kept in `prior_samples_dir`. Metrics have the names of TRL 1.13's XPOTrainer; `reward` is the mean
    over both halves, `objective/model_scores` the policy's. See `docs/coming_from_xpo_trainer.md`.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_bayes import XPOConfig, XPOTrainer

    >>> trainer = XPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs="trl-lib/Qwen2-0.5B-Reward",
    ...     args=XPOConfig(output_dir="out", beta=0.1, num_generations=8),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback-prompt", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        args ([`XPOConfig`], *optional*): Configuration.
        judge (`Callable`, *optional*):
            `judge(prompts, pairs)` returns for each pair of completions the probability that the first is better
            (`float`), or the index of the better one (`int`; -1 for none). With it `reward_funcs` may be left out; if
            given they are logged only.

    All other arguments are those of [`~trl.GRPOTrainer`].
    """

    _tag_names = ["trl", "trl-bayes", "xpo"]
    _name = "XPO"
    _paper = {
        "title": "Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient RLHF",
        "id": "2405.21046",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{xie2025exploratory,
                title        = {{Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient RLHF}},
                author       = {Tengyang Xie and Dylan J. Foster and Akshay Krishnamurthy and Corby Rosset and Ahmed Awadallah and Alexander Rakhlin},
                year         = 2025,
                booktitle    = {International Conference on Learning Representations},
                eprint       = {arXiv:2405.21046},
            }"""),  # noqa: E501
    }

    config_class = XPOConfig
    args: XPOConfig

    def make_estimator(self, args: PosteriorConfig) -> Estimator:
        return Preference(args.make_divergence(), cast(XPOConfig, args).make_loss())
