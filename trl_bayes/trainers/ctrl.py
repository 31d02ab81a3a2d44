"""InfAlign-CTRL: KL-RL on a calibrated and transformed reward, for policies that are decoded by best-of-N."""

import textwrap
from dataclasses import dataclass, field

from ..targets.transforms import Transform, build_transform, temperature
from .kl_rl import KLRLConfig, KLRLTrainer


INFERENCE_PROCEDURES = ("best_of_n", "worst_of_n")


@dataclass
class CTRLConfig(KLRLConfig):
    r"""
    Configuration for the [`CTRLTrainer`].

    This class includes only the parameters that are specific to InfAlign-CTRL. For the others see [`PosteriorConfig`]
    and [`~trl.GRPOConfig`]. `num_prior_samples` is the number of completions that a reward is calibrated by.

    Parameters:
        inference_procedure (`str`, *optional*, defaults to `"best_of_n"`):
            What is done with the trained policy. `"best_of_n"`: the best of `inference_n` completions is used.
            `"worst_of_n"`: the worst is what counts, as under an attack by `inference_n` tries (best-of-N
            jailbreaking).
        inference_n (`int`, *optional*, defaults to `4`):
            `N` of the inference procedure, at least 2.
        transform_rate (`float`, *optional*):
            Rate `t` of the transform `exp(t u)` or `-exp(-t u)`. Defaults to 5 for `inference_n=2` and to 10 for more,
            which is the better of the two for best-of-N at 0.5 nats.
        kl_budget (`float`, *optional*):
            How far the posterior may be from the prior, `KL(p||pi_0)` in nats, in (0, 5]; sets `beta`. Defaults to 0.5
            where `beta` is unset too.
        beta (`float`, *optional*):
            Temperature, in units of the transform per nat, which are hard to guess (`exp(10 u)` reaches 22,000): set
            `kl_budget` instead.
        partition (`str`, *optional*, defaults to `"known"`):
            How `Z(x)`, which is logged only, is found; see [`PosteriorConfig`].
    """

    allows_zero_beta = False

    # Parameters whose default values are overridden from PosteriorConfig
    beta: float | None = field(  # type: ignore[assignment]  # a number from `__post_init__` on
        default=None,
        metadata={
            "help": "Temperature of the posterior, in units of the transform per nat: better set by `kl_budget`."
        },
    )
    partition: str = field(
        default="known",
        metadata={
            "help": "How Z(x), which is logged only, is found: 'known' (from the ranks), "
            "'prior_samples', 'leave_one_out' or 'running'.",
            "choices": list(KLRLConfig.__dataclass_fields__["partition"].metadata["choices"]),
        },
    )

    # Parameters that control the target
    inference_procedure: str = field(
        default="best_of_n",
        metadata={
            "help": "What is done with the trained policy: 'best_of_n' (the best of N completions is used) or "
            "'worst_of_n' (the worst counts, as under an attack).",
            "choices": list(INFERENCE_PROCEDURES),
        },
    )
    inference_n: int = field(default=4, metadata={"help": "N of the inference procedure, at least 2."})
    transform_rate: float | None = field(
        default=None,
        metadata={"help": "Rate t of the transform exp(t u) or -exp(-t u). Defaults to 5 for N = 2, else to 10."},
    )
    kl_budget: float | None = field(
        default=None,
        metadata={
            "help": "How far the posterior may be from the prior, KL(p||pi_0) in nats; sets `beta`. Defaults to 0.5 "
            "where `beta` is unset too."
        },
    )

    def __post_init__(self) -> None:
        if self.inference_procedure not in INFERENCE_PROCEDURES:
            raise ValueError(
                f"Unknown `inference_procedure={self.inference_procedure!r}`: use one of {list(INFERENCE_PROCEDURES)}."
            )
        if self.inference_n < 2:
            raise ValueError(
                f"`inference_n={self.inference_n}` leaves nothing to choose from: set it to 2 or more, or use "
                "KLRLTrainer for a policy that is sampled from once."
            )
        if self.transform_rate is None:
            self.transform_rate = 5.0 if self.inference_n == 2 else 10.0
        self.beta = temperature(self.make_transform(), self.beta, self.kl_budget)
        target = {
            "name": "calibrated",
            "transform": f"ctrl_{self.inference_procedure}",
            "t": self.transform_rate,
            "beta": self.beta,
        }
        if self.target not in (None, target):  # equal where a config is made from the fields of another
            raise ValueError(
                "The target of CTRLTrainer follows from `inference_procedure`, `inference_n` and `kl_budget`: leave "
                "`target` unset, or use KLRLTrainer for another."
            )
        self.target = target
        super().__post_init__()

    def make_transform(self) -> Transform:
        """The transform `Phi` of the calibrated reward."""
        return build_transform(f"ctrl_{self.inference_procedure}", t=self.transform_rate)


class CTRLTrainer(KLRLTrainer):
    r"""
    Trainer for InfAlign-CTRL, from [InfAlign: Inference-aware language model
    alignment](https://huggingface.co/papers/2412.19792).

    The only change with respect to [`KLRLTrainer`] is the target, which is the paper's: calibrate the reward by its
    quantile under the prior, transform it for what is done at inference, and do RL with a KL penalty on the result.

        phi(x, y) = Phi(u) / beta,        u = P_{z~pi_0}(r(z) < r(y)) + P(r(z) = r(y)) / 2

    with `Phi = exp(t u)` where the best of N completions will be used, and `Phi = -exp(-t u)` where the worst will
    count. The win rate that is optimized is that of the whole procedure, best of N of the policy against best of N of
    the prior, at a given `KL(p||pi_0)`. Since `u` is uniform under the prior whatever the reward, `beta` alone decides
    that distance, and `kl_budget` sets it in nats. Ties (discrete rewards) make it smaller.

    Samples of the prior, `num_prior_samples` for each prompt, are drawn and scored before the first update.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_bayes import CTRLConfig, CTRLTrainer

    >>> trainer = CTRLTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs="OpenAssistant/reward-model-deberta-v3-large-v2",
    ...     args=CTRLConfig(output_dir="out", inference_procedure="best_of_n", inference_n=4, kl_budget=0.5),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback-prompt", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        args ([`CTRLConfig`], *optional*): Configuration.

    All other arguments are those of [`~trl.GRPOTrainer`].
    """

    _tag_names = ["trl", "trl-bayes", "infalign-ctrl"]
    _name = "InfAlign-CTRL"
    _paper = {
        "title": "InfAlign: Inference-aware language model alignment",
        "id": "2412.19792",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{balashankar2025infalign,
                title        = {{InfAlign: Inference-aware language model alignment}},
                author       = {Ananth Balashankar and Ziteng Sun and Jonathan Berant and Jacob Eisenstein and Michael Collins and Adrian Hutter and Jong Lee and Chirag Nagpal and Flavien Prost and Aradhana Sinha and Ananda Theertha Suresh and Ahmad Beirami},
                year         = 2025,
                booktitle    = {International Conference on Machine Learning},
                eprint       = {arXiv:2412.19792},
            }"""),  # noqa: E501
    }

    config_class = CTRLConfig
    makes_target = True
