"""log Z from importance weights with its error, for all who have weighted samples.

    log w_i = log P(y_i) - log q(y_i),    Z_hat = mean_i w_i,    ESS = (sum w)^2 / sum w^2

With samples of the prior, `log w = phi`. The estimates are those of [`trl_bayes.groups`]; here arrays are flat (N,),
with `prompt_index` (N,), since prompts may have different numbers of samples.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..groups import differ, effective_sample_size, pooled_log_z
from .estimate import Estimate, average, enough_of_each


MIN_WEIGHT_OF_BOUND = 3


def log_z_variance(log_weights: Tensor, valid: Tensor) -> Tensor:
    """
    Variance of [`~trl_bayes.groups.pooled_log_z`], (P,), by the delta method: that of the mean weight over its square.

    With ESS as a number of samples it is `(1/ESS - 1/n) n / (n - 1)`. NaN for a group without evidence, and 0 for a
    single completion.

    Args:
        log_weights (`torch.Tensor`): (P, N) in nats.
        valid (`torch.Tensor`): boolean (P, N), what counts.
    """
    fraction = effective_sample_size(log_weights, valid)
    count = valid.sum(dim=1)
    variance = (1 / fraction - 1).clamp(min=0) / (count - 1).clamp(min=1)
    return torch.where(fraction > 0, variance, torch.nan)


class LogZPerPrompt(NamedTuple):
    """log Z of each prompt, `(P,)`, with the variance of the estimate and the effective number of samples."""

    log_z: Tensor
    variance: Tensor
    effective_samples: Tensor
    trusted: bool
    note: str

    def average(self) -> Estimate:
        """The mean over prompts of log Z."""
        return average(self.log_z, self.variance, self.trusted, self.note)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: the average, and how few effective samples a prompt has."""
        effective = self.effective_samples
        return {
            "log_z": self.average().to_dict(),
            "effective_samples": {"mean": effective.mean().item(), "min": effective.min().item()},
        }


def log_z_per_prompt(
    log_weights: Tensor, prompt_index: Tensor, num_prompts: int, max_log_weight: float | None = None
) -> LogZPerPrompt:
    """
    `log Z_p = log mean_i w_i` of each prompt, with its variance, and whether to trust it.

    It takes an effective sample size of at least 30 for each prompt; and if the largest possible weight is known, the
    weights must add up to at least 3 times that. Otherwise an outcome too rare to have been seen (probability below
    3/N, at 95 %) could double Z. If it is not known, the weights of each prompt must differ: equal ones are what is
    seen where nothing is.

    Args:
        log_weights (`torch.Tensor`): (N,) in nats; `-inf` where there is no evidence.
        prompt_index (`torch.Tensor`): (N,) int64.
        num_prompts (`int`): P.
        max_log_weight (`float`, *optional*): the largest that any completion could have, if it is known.

    Raises:
        ValueError: weights with NaN or +inf, or above `max_log_weight`.
    """
    log_weights = log_weights.double()
    check_log_weights(log_weights, max_log_weight)
    order = prompt_index.argsort(stable=True)
    count = torch.bincount(prompt_index, minlength=num_prompts)  # (P,)
    # One group after the other, since a padded table would be as wide as the largest
    groups = [group.unsqueeze(0) for group in log_weights[order].split(count.tolist())]
    log_z, variance, fraction = (
        torch.cat([measure(group, torch.ones_like(group, dtype=torch.bool)) for group in groups])
        for measure in (pooled_log_z, log_z_variance, effective_sample_size)
    )
    log_z, effective = torch.where(count > 0, log_z, torch.nan), fraction * count
    trusted, note = enough_of_each(effective, "effective samples of the posterior")
    if trusted and max_log_weight is not None:
        of_bound = (log_z + count.log() - max_log_weight).exp().min().item()
        if of_bound < MIN_WEIGHT_OF_BOUND:
            trusted, note = False, "an outcome too rare to have been seen could double Z for some prompt"
    elif trusted and not all(differ(group) for group in groups):
        trusted, note = (
            False,
            "all samples of some prompt have the same weight, so one too rare to have been seen could double Z",
        )
    return LogZPerPrompt(log_z, variance, effective, trusted, note)


def check_log_weights(log_weights: Tensor, largest: float | None) -> None:
    """Refuses what is no log-potential of prior samples: NaN, +inf, or more than the bound that was given."""
    if log_weights.isnan().any() or log_weights.isposinf().any():
        raise ValueError("The log-potential must be below +inf and not NaN: leave out samples without any reward.")
    if largest is not None and log_weights.numel() and log_weights.max().item() > largest + 1e-9:
        raise ValueError(
            f"A sample has the log-potential {log_weights.max().item():.6g}, above "
            f"`max_log_potential={largest:.6g}`: give a bound that holds for every completion."
        )
