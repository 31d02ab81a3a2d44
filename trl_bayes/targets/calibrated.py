"""Rewards calibrated by their quantiles under the prior."""

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..prior import Context, PromptTable
from .per_prompt import PerPromptTarget
from .transforms import Transform, build_transform, calibrated_law


class Calibrated(PerPromptTarget):
    r"""
    A function of how a completion's reward ranks among the prior's for the same prompt: `phi = Phi(u) / beta`.

        u(x, y) = P_{z~pi_0}(r(z) < r(y)) + P(r(z) = r(y)) / 2

    `u` does not change when the reward is stretched or shifted, prompt by prompt. If the reward is continuous, `u` is
    uniform under the prior, so `Z = \int_0^1 exp(Phi(u)/beta) du` is known and the same for every prompt. With
    [`best_of_n`] the target is the law of best-of-N sampling ([vBoN](https://huggingface.co/papers/2407.06057)), with
    [`ctrl_best_of_n`] and [`ctrl_worst_of_n`] that of
    [InfAlign-CTRL](https://huggingface.co/papers/2412.19792), with [`identity`] that of
    [QRPO](https://huggingface.co/papers/2507.08068).

    From `n` prior samples, a new completion takes the quantiles from `a = #less/(n + 1)` to
    `b = (#less + #equal + 1)/(n + 1)`, and `u` is the middle of them: its rank among `n + 1`, which is one of `n + 1`
    equally likely values for a continuous reward. So what is below every prior sample keeps a little probability, and
    quantiles are resolved to `1/n` only: enough while `KL(p||pi_0)` is below about `log n - 2`.

    **Ties.** Completions with the same reward share the quantiles from `a` to `b`. [`best_of_n`] and [`worst_of_n`]
    give them together what the law of their name gives to these quantiles,

        phi = log mean of exp(Phi(u)/beta) over a < u < b,

    the posterior of ranks whose ties are broken at random, so that `Z` is as without ties. InfAlign and QRPO define
    their reward as a function of the completion, InfAlign's with half of the ties counted as above: for the other
    transforms `phi = Phi(u)/beta` at the middle, and `Z` and `KL(p||pi_0)` depend on the ties.

    Args:
        transform ([`Transform`] or `str`): `Phi`.
        beta (`float`, *optional*):
            Temperature. Defaults to the transform's own: `1/(N-1)` for `best_of_n(N)` and `worst_of_n(N)`.
        rewards (`str` or `list[str]`, *optional*):
            Names of the reward functions whose weighted sum is calibrated. Defaults to all but those of weight 0.
    """

    learns_its_bound = True

    def __init__(
        self, transform: Transform | str, beta: float | None = None, rewards: str | Sequence[str] | None = None
    ):
        super().__init__(rewards)
        self.transform = build_transform(transform)
        beta = self.transform.default_beta if beta is None else beta
        if beta is None:
            raise ValueError(
                f"`Calibrated` needs a `beta` with the transform {self.transform}, which has none of its own: give a "
                "temperature, for instance `beta_for_kl(transform, 0.5)`."
            )
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"`Calibrated` needs a positive finite `beta` (the posterior's temperature), got {beta}.")
        self.beta = float(beta)
        self._looked_for_ties = False
        self._largest: tuple[PromptTable, float] | None = None  # of which table, and its largest `phi`

    @classmethod
    def arguments_from_config(cls, given: Mapping[str, Any], beta: float | None) -> dict[str, Any]:
        """The transform is made from its name and the entries that are its own; then as for any target."""
        if "transform" not in given:
            return dict(given)
        own = {key: value for key, value in given.items() if key not in inspect.signature(cls).parameters}
        transform = build_transform(given["transform"], **own)
        rest = {key: value for key, value in given.items() if key not in own}
        run_s = cls.default_beta if beta is None else beta
        own_s = transform.default_beta
        return {"beta": run_s if own_s is None else own_s, **rest, "transform": transform}

    def learn(self, rewards: torch.Tensor) -> torch.Tensor:
        """Each prompt's rewards in ascending order, `(P, N)`, filled up with `inf`."""
        totals = _in_single_precision(self.prior_totals(rewards))
        return totals.masked_fill(totals.isnan(), math.inf).sort(dim=1).values

    def calibrate(self, rewards: torch.Tensor, context: Context | None) -> torch.Tensor:
        """The calibrated reward `u` in (0, 1) of each completion, `(N,)` float64; `NaN` where no reward applies."""
        a, b = self._quantiles(rewards, context)
        return (a + b) / 2

    def _quantiles(self, rewards: torch.Tensor, context: Context | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the quantiles of each completion begin and end, `(N,)` float64; `NaN` where no reward applies."""
        total = _in_single_precision(self.weighted_sum(rewards))  # (N,)
        unscored = total.isnan()
        rows = self.table.rows(self.require_context(context).prompt_key).to(total.device)
        begin = torch.full_like(total, torch.nan, dtype=torch.float64)
        end = begin.clone()
        # Prompt by prompt: there may be many completions, and many samples of each prompt
        for row in rows.unique().tolist():
            of_prompt = (rows == row) & ~unscored
            prior = self.table.values[row].to(total)  # (n,)
            less, less_or_equal = _ranks(prior, total[of_prompt])
            begin[of_prompt], end[of_prompt] = _among_one_more(less, less_or_equal, prior.isfinite().sum())
        return begin, end

    def _phi(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`phi` of completions that take the quantiles from `a` to `b`, any shape, float64."""
        if self.transform.log_mean is not None:
            return self.transform.log_mean(a, b, self.beta)
        return self.transform((a + b) / 2) / self.beta

    def log_potential(self, rewards: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        return self._phi(*self._quantiles(rewards, context)).to(rewards.dtype)

    def max_log_potential(self) -> float | None:
        """The largest `phi` at any place among the prior samples, known once they are."""
        if not self.is_fitted:
            return None
        if self._largest is None or self._largest[0] is not self.table:
            self._largest = self.table, self._largest_phi(self.table.values)
        return self._largest[1]

    def _largest_phi(self, prior: torch.Tensor) -> float:
        """At any place among prior samples `(P, n)`."""
        count = prior.isfinite().sum(dim=1, keepdim=True)
        between = torch.arange(prior.size(1) + 1).double().minimum(count)  # (P, n + 1): above so many samples
        less, less_or_equal = _ranks(prior, prior)
        tied = less.minimum(count), less_or_equal.minimum(count)
        places = [_among_one_more(between, between, count), _among_one_more(*tied, count)]
        return max(self._phi(*place).max().item() for place in places)

    def log_z(self, keys: torch.Tensor) -> torch.Tensor:
        """
        `log Z`, the same for every prompt: `Z` is the integral of `exp(Phi(u)/beta)` over (0, 1).

        Exact for a transform with a `log_mean` ([`best_of_n`], [`worst_of_n`]): `exp(phi)` has this mean over new
        completions and prior samples, whatever ties there are. Otherwise the mean of `exp(Phi/beta)` over the ranks
        that prior samples have among each other: without ties these are `(i - 1/2)/n`, and it is the integral by the
        midpoint rule, up to `O(1/n^2)` and without noise; ties make it an estimate for each prompt, and that is said.
        """
        prior = self.table.lookup(keys)  # (P, n)
        count = prior.isfinite().sum(dim=1, keepdim=True)
        if self.transform.log_mean is not None:
            whole = self.transform.log_mean(torch.zeros(1).double(), torch.ones(1).double(), self.beta)
            return torch.where(count > 0, whole.to(keys.device), torch.nan).squeeze(1)
        self._warn_of_ties()
        less, less_or_equal = _ranks(prior, prior)
        u = (less + less_or_equal) / 2 / count
        phi = (self.transform(u) / self.beta).masked_fill(prior.isinf(), -math.inf)
        return torch.where(count > 0, phi.logsumexp(dim=1, keepdim=True) - count.log(), torch.nan).squeeze(1)

    def _warn_of_ties(self) -> None:
        if self._looked_for_ties:
            return
        self._looked_for_ties = True
        if (tied := self.diagnostics()["calibrated/tied_frac"]) > 0:
            warnings.warn(
                f"{tied:.1%} of the prior samples share their reward with another of the same prompt, so `log Z` of "
                f"`Calibrated` with {self.transform} has no closed form: it is estimated from the prior samples.",
                stacklevel=3,
            )

    def warn_of_too_few_samples(self, num_samples: int) -> None:
        distance = calibrated_law(self.transform, self.beta).kl_prior
        resolved = math.log(num_samples) - 2
        if distance > resolved:
            warnings.warn(
                f"{num_samples} samples of the prior for each prompt resolve a target that is up to log K - 2 = "
                f"{resolved:.2g} nats from the prior, but {self!r} is {distance:.2g} nats away: set the number of "
                f"prior samples to {math.ceil(math.exp(distance + 2)):,}, or choose a target nearer to the prior.",
                stacklevel=2,
            )

    def diagnostics(self) -> dict[str, float]:
        if not self.is_fitted:
            return {}
        prior = self.table.values
        equal_to_next = (prior[:, 1:] == prior[:, :-1]) & prior[:, 1:].isfinite()
        tied = torch.nn.functional.pad(equal_to_next, (0, 1)) | torch.nn.functional.pad(equal_to_next, (1, 0))
        return {"calibrated/tied_frac": (tied.sum() / prior.isfinite().sum()).item()}

    def settings(self) -> dict[str, Any]:
        return {"transform": self.transform, "beta": self.beta, **super().settings()}


def _in_single_precision(totals: torch.Tensor) -> torch.Tensor:
    """Rewards as a training has them, float64: what ties there must tie wherever the same target is evaluated."""
    return totals.float().double()


def _ranks(ascending: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of each row `(..., n)` are less than, and at most, its values `(..., M)`; float64, shape `(..., M)`."""
    less, less_or_equal = (torch.searchsorted(ascending, values, right=right) for right in (False, True))
    return less.double(), less_or_equal.double()


def _among_one_more(
    less: torch.Tensor, less_or_equal: torch.Tensor, count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the quantiles of a completion begin and end, by its ranks among `count` samples and itself."""
    return less / (count + 1), (less_or_equal + 1) / (count + 1)
