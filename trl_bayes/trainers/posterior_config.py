"""Settings shared by all trainers, and the refusal of those under which the fixed point is not the posterior."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl import GRPOConfig

from ..divergences import DIVERGENCES, Divergence, get_divergence
from ..partitions import PARTITIONS
from .exactness import inexact_settings


INEXACT_SETTINGS = ("refuse", "warn")

NO_EFFECT = (
    "loss_type",
    "epsilon",
    "epsilon_high",
    "delta",
    "importance_sampling_level",
    "use_bias_correction_kl",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)
"""GRPO's own loss and clipping: accepted, so that a GRPO script runs as it is, and not used."""


_WITHOUT_SIBLINGS = ("prior_samples", "known")
"""Partitions that say `log Z` of a completion that has no siblings and no past."""


_SMALLER_IS_BETTER = (
    "posterior/forward_kl",
    "posterior/reverse_kl",
    "posterior/kl_prior",
    "posterior/frac_no_evidence",
    "posterior/frac_unscored",
    "posterior/frac_infinite_reward",
    "posterior/capped_frac",
    "posterior/pseudo_reward_std",
    "kl",
    "objective/kl",
    "loss/dpo",
    "loss/xpo",
)
"""Metrics of which transformers would take the largest for the best, behind `eval_` and the name of a data set."""


class _One(int):
    """The number 1 for TRL's checks but for that of `num_generations < 2`, where GRPO could not tell its advantage."""

    def __new__(cls) -> "_One":
        return super().__new__(cls, 1)

    def __lt__(self, other: int) -> bool:
        return False


@dataclass
class PosteriorConfig(GRPOConfig):
    r"""
    Configuration shared by the trainers of trl_bayes.

    This class includes only the parameters that are specific to trl_bayes. All others are those of
    [`~trl.GRPOConfig`], with the defaults changed to the exact ones (`scale_rewards="none"`, `disable_dropout=True`):
    with them the trainer's fixed point is the posterior. Settings that would move the fixed point are refused.

    Parameters:
        beta (`float`, *optional*, defaults to `0.1`):
            Temperature of the posterior `p ∝ pi_0 exp(r / beta)`, in units of reward per nat. This is the coefficient
            of KL-regularized RL, `E[r] - beta KL(pi||pi_0)`. `0.0` (no prior: pure RL) is for [`KLRLTrainer`] only.
        target (`str` or `dict[str, Any]`, *optional*):
            The posterior to approximate: a name (`tilt`, `constraint`, `moments`, ...), a mapping with `name` and the
            target's arguments, or the dotted path of a [`~trl_bayes.targets.Target`] class. Defaults to `tilt` with
            temperature `beta` over the weighted sum of the rewards.
        partition (`str`, *optional*, defaults to `"running"`):
            How `Z(x)` is found. `"leave_one_out"`: from the other completions of the group.
            `"running"`: the same, pooled with all earlier visits to the prompt, which is sharper where prompts come
            back and the same where they do not. `"prior_samples"`: from `num_prior_samples` samples of the prior for
            each prompt, drawn before the first update and then fixed, which makes the gradient unbiased given them
            (but for a completion that contradicts them, and prompts whose samples are all worth the same: these go on
            as `"running"`). `"known"`: the target's own, for one that knows it (`calibrated`, `chi_squared`). With the
            last two `num_generations=1` works: a completion is compared with what all are worth at the posterior.
        num_prior_samples (`int`, *optional*, defaults to `100`):
            Samples of the prior for each prompt, where the target or the partition needs them.
        prior_samples_dir (`str`, *optional*):
            Folder in which they are kept and found again. Defaults to `prior_samples` in `output_dir`.
        pseudo_reward_cap (`float`, *optional*):
            Largest magnitude of the factor of a completion's `grad log pi`, which is that of `D_f / f''(1)`: for KL-RL
            the centered pseudo-reward in nats, for Jensen-Shannon four times it, for DPG a difference of importance
            weights; times `pi/q` off-policy. `None` is exact; a cap (alpha-DPG uses 10) trades bias for stability,
            and `posterior/capped_frac` says how often it acts.
        prior_model_name_or_path (`str`, *optional*):
            The prior `pi_0`, when it is not the model that training starts from. Loaded with `model_init_kwargs`.
        inexact_settings (`str`, *optional*, defaults to `"refuse"`):
            What happens to settings under which the fixed point is not the posterior, such as `top_p=0.95`,
            `scale_rewards="group"` or `mask_truncated_completions=True`. `"refuse"`: an error that says what to set.
            `"warn"`: one warning that says where training goes instead, and a mark in the model card.
        check_log_probs (`bool`, *optional*, defaults to `True`):
            Before the first update, compares the log-probabilities of a few completions (the policy's, the prior's and
            vLLM's) with those of a plain forward pass without padding, in evaluation mode, and what `generate` gives
            three tokens with what a forward pass gives them. Training stops where they differ by more than rounding:
            the result would not be the posterior.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["target"]

    allows_zero_beta: ClassVar[bool] = False
    without_effect: ClassVar[tuple[str, ...]] = NO_EFFECT

    # Parameters whose default values are overridden from GRPOConfig
    beta: float = field(
        default=0.1,
        metadata={
            "help": "Temperature of the posterior p ∝ pi_0 exp(r / beta), in units of reward per nat: the coefficient "
            "of KL-regularized RL. 0.0 (no prior, pure RL) is for KLRLTrainer only."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "Must be 'none': dividing rewards by their standard deviation changes the posterior's temperature "
            "from prompt to prompt."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Whether to disable dropout. With dropout the policy that is scored is not the one that sampled."
        },
    )

    # Parameters that control the target
    target: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "The posterior to approximate: a name ('tilt', 'constraint', 'moments', ...), a mapping with "
            "'name' and the target's arguments, or the dotted path of a Target class. Defaults to 'tilt'."
        },
    )
    prior_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The prior pi_0, when it is not the model that training starts from."},
    )

    # Parameters that control the estimators
    partition: str = field(
        default="running",
        metadata={
            "help": "How Z(x) is found: 'leave_one_out' (the other completions of the group), "
            "'running' (the same, pooled with all earlier visits to the prompt), 'prior_samples' (from samples of the "
            "prior, drawn before the first update) or 'known' (the target's own).",
            "choices": list(PARTITIONS),
        },
    )
    num_prior_samples: int = field(
        default=100,
        metadata={"help": "Samples of the prior for each prompt, where the target or the partition needs them."},
    )
    prior_samples_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the prior samples. Defaults to `prior_samples` in `output_dir`."},
    )
    check_log_probs: bool = field(
        default=True,
        metadata={
            "help": "Before the first update, compare the scores of a few completions, and generation's own, with a "
            "plain unpadded forward pass, and stop where they differ by more than rounding."
        },
    )
    inexact_settings: str = field(
        default="refuse",
        metadata={
            "help": "What happens to settings under which the fixed point is not the posterior (top_p, scale_rewards, "
            "...): 'refuse', or 'warn' once and say so in the model card.",
            "choices": list(INEXACT_SETTINGS),
        },
    )
    pseudo_reward_cap: float | None = field(
        default=None,
        metadata={
            "help": "Largest magnitude of a completion's centered pseudo-reward. None is exact; a cap trades bias for "
            "stability (alpha-DPG uses 10)."
        },
    )

    def __post_init__(self) -> None:
        self._check_group_size()
        if self.greater_is_better is None and f"_{self.metric_for_best_model}".endswith(
            tuple(f"_{metric}" for metric in _SMALLER_IS_BETTER)
        ):
            self.greater_is_better = False
        scale_rewards = self.scale_rewards  # TRL gives True another name
        is_one = self.num_generations == 1
        self.num_generations = _One() if is_one else self.num_generations
        super().__post_init__()
        self.num_generations = 1 if is_one else self.num_generations
        self._check_posterior_parameters()
        self.inexact = inexact_settings(self, scale_rewards)
        if self.inexact and self.inexact_settings == "refuse":
            refusals = " ".join(inexact.refusal for inexact in self.inexact)
            raise ValueError(f"{refusals} To train all the same, set `inexact_settings='warn'`.")

    def _check_group_size(self) -> None:
        """A completion alone is compared with a `Z` that it has no part in, so there must be one."""
        informed = self.partition in _WITHOUT_SIBLINGS and self.beta != 0
        if self.num_generations is not None and self.num_generations < (1 if informed else 2):
            raise ValueError(
                f"`num_generations={self.num_generations}` leaves a completion without siblings for the leave-one-out "
                "evidence and baseline: set `num_generations` to 2 or more, or to 1 with "
                "`partition='prior_samples'` or `'known'`."
            )

    def _check_posterior_parameters(self) -> None:
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ValueError(
                f"`max_completion_length={self.max_completion_length}` is no length, and transformers would cut at "
                "one of its own: set the number of tokens at which a completion is cut."
            )
        if not self.temperature > 0:
            raise ValueError(f"`temperature={self.temperature}` does not sample: set it above 0 (1.0 is the model's).")
        if self.inexact_settings not in INEXACT_SETTINGS:
            raise ValueError(
                f"Unknown `inexact_settings={self.inexact_settings!r}`: use one of {list(INEXACT_SETTINGS)}."
            )
        if not self.check_log_probs and self.use_vllm and self.vllm_mode == "server" and self.temperature != 1:
            raise ValueError(
                "Whether a vLLM server reports log-probabilities at `temperature` is only known by the check that "
                "`check_log_probs=False` leaves out: set it to True, and start the server with `--logprobs-mode "
                "processed_logprobs`."
            )
        if not self.beta >= 0:  # also refuses NaN
            raise ValueError(f"`beta={self.beta}` is not a temperature: set a positive number of reward per nat.")
        if self.beta == 0 and not self.allows_zero_beta:
            raise ValueError(
                "`beta=0` has no posterior (it is pure RL): set `beta` > 0, or use KLRLTrainer for pure RL."
            )
        if self.sync_ref_model and self.prior_model_name_or_path is not None:
            raise ValueError(
                "`sync_ref_model=True` would overwrite the prior that `prior_model_name_or_path` names: leave one of "
                "them out."
            )
        if self.partition not in PARTITIONS:
            raise ValueError(f"Unknown `partition={self.partition!r}`: use one of {list(PARTITIONS)}.")
        if self.num_prior_samples < 2:
            raise ValueError(
                f"`num_prior_samples={self.num_prior_samples}` is too few to learn from: set it to 2 or more."
            )
        if self.pseudo_reward_cap is not None and not self.pseudo_reward_cap > 0:
            raise ValueError(
                f"`pseudo_reward_cap={self.pseudo_reward_cap}` must be positive: unset is the exact gradient."
            )

    def make_divergence(self) -> Divergence:
        """The divergence `D_f(pi||p)` that is minimized."""
        raise NotImplementedError(f"{type(self).__name__} names no divergence: use the config of a trainer.")

    @property
    def steps_per_batch(self) -> int:
        """Forward passes for which one generated batch is used."""
        return self.num_iterations * (self.steps_per_generation or 1)

    @property
    def share_of_prior(self) -> str | None:
        """The setting that asks for completions of the prior in each group, if one does."""
        return None

    @property
    def keeps_text(self) -> str | None:
        """What takes completions that are kept as text into a batch, for a message; `None` if nothing does."""
        return None

    def ineffective_settings(self) -> str | None:
        """A sentence on GRPO parameters that the user changed and that these trainers do not use."""
        changed = [
            name
            for name in self.without_effect
            if getattr(self, name) != GRPOConfig.__dataclass_fields__[name].default
        ]
        if not changed:
            return None
        names = " and ".join(f"`{name}`" for name in changed)
        return (
            f"{names} {'has' if len(changed) == 1 else 'have'} no effect: the loss is the divergence to the posterior "
            "instead of GRPO's, without clipping."
        )


@dataclass
class DivergenceConfig(PosteriorConfig):
    r"""
    Configuration of a trainer for any f-divergence.

    Parameters:
        divergence (`str`, *optional*, defaults to `"jensen_shannon"`):
            Divergence `D_f(pi||p)` to minimize: `forward_kl`, `reverse_kl`, `jensen_shannon`, `total_variation`,
            `squared_hellinger`, `pearson_chi2`, `neyman_chi2` or `alpha`.
        alpha (`float`, *optional*):
            Order of the `alpha` divergence: 0 is forward KL, 1 is reverse KL.
    """

    divergence: str = field(
        default="jensen_shannon",
        metadata={"help": "Divergence D_f(pi||p) to minimize.", "choices": list(DIVERGENCES)},
    )
    alpha: float | None = field(
        default=None,
        metadata={"help": "Order of the 'alpha' divergence: 0 is forward KL, 1 is reverse KL."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_divergence()  # refuses an unknown one before any model is loaded

    def make_divergence(self) -> Divergence:
        return get_divergence(self.divergence, self.alpha)
