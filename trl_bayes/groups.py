"""Groups of completions: what is known of each one, importance weights, and log Z from them.

`P` prompts have `G` completions each, drawn from a proposal `q` (the policy that generated them). All quantities are
per-sequence log-probabilities in nats. With `P(y|x) = pi_0(y|x) exp(phi(x, y))` the unnormalized posterior,

    log w_i = log P(y_i) - log q(y_i),    Z_hat = mean_i w_i.

`valid` is a boolean mask `(P, G)`: completions that no reward function scored are absent from every sum. Nothing here
knows a model or a trainer.
"""

import math
from typing import NamedTuple

import torch


NEG_INF = float("-inf")
_LEAST_OF_ALL = math.log(3 / 4)  # of the mean of all weights, that a heavy one is compared with


class Group(NamedTuple):
    """What is known of the `G` completions of each of `P` prompts; in nats, each of shape `(P, G)`."""

    log_policy: torch.Tensor
    """`log pi` of the policy that is trained, at the time of sampling."""
    log_proposal: torch.Tensor
    """`log q` of the distribution that the completions were sampled from."""
    log_prior: torch.Tensor
    """`log pi_0`; zeros in pure RL, which has no prior."""
    phi: torch.Tensor
    """The log-potential; `-inf` outside the posterior's support, `NaN` for a completion without any reward."""
    prompt_keys: torch.Tensor | None = None
    """Identity of each prompt, int64 `(P,)`, where someone has to know it."""
    from_prior: torch.Tensor | None = None
    """Which completions the prior has sampled, boolean `(P, G)`, where it samples as many of each group. They are
    weighted like the others, by a `log_proposal` that is the mixture's, but say nothing of what the policy samples."""

    @property
    def of_policy(self) -> torch.Tensor:
        """Which completions the policy has sampled, boolean `(P, G)`."""
        return torch.ones_like(self.phi, dtype=torch.bool) if self.from_prior is None else ~self.from_prior

    @property
    def valid(self) -> torch.Tensor:
        """Which completions have a log-potential, boolean `(P, G)`."""
        return ~self.phi.isnan()

    @property
    def tells_z(self) -> torch.Tensor:
        """
        Whether a group says something of its prompt's `Z`, boolean `(P,)`: at least two log-potentials that differ.

        Otherwise its weights are equal at the prior, whatever the evidence that was not sampled, just as they are at
        the posterior.
        """
        return differ(self.phi)

    @property
    def log_target(self) -> torch.Tensor:
        """`log P = log pi_0 + phi`; the prior's alone where there is no log-potential."""
        return self.log_prior + self.phi.masked_fill(~self.valid, 0.0)

    @property
    def log_weights(self) -> torch.Tensor:
        """`log w = log P - log q`."""
        return self.log_target - self.log_proposal


def differ(phi: torch.Tensor) -> torch.Tensor:
    """Whether some of the log-potentials of each prompt differ, boolean `(P,)` from `(P, N)`; NaN is left out."""
    largest = phi.nan_to_num(nan=NEG_INF, neginf=NEG_INF).amax(dim=1)
    smallest = phi.nan_to_num(nan=-NEG_INF, neginf=NEG_INF).amin(dim=1)
    return largest > smallest


def finite_exp(x: torch.Tensor) -> torch.Tensor:
    """`e^x`, at most the root of the largest float: what lies beyond is as good as infinite, but must not overflow."""
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) / 2).exp()


def leave_one_out_log_z(
    weights: torch.Tensor,
    valid: torch.Tensor,
    past_log_sum: torch.Tensor | None = None,
    past_count: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `Z` for each sample from all samples but itself: `Z_hat_{-i} = (S + sum_{j != i} w_j) / (N + n - 1)`.

    A sample's own weight in its `Z` shrinks its ratio `w_i / Z_hat`, which biases the gradient; its siblings' do not.
    `S` and `N` are the sum and the number of weights that earlier visits to the same prompt left behind (the `running`
    partition); without them this is the plain leave-one-out estimate.

    A sample without others, in the group or the past, gets the estimate from itself.

    Args:
        weights (`torch.Tensor`): log importance weights `(P, G)`.
        valid (`torch.Tensor`): boolean `(P, G)`.
        past_log_sum (`torch.Tensor`, *optional*): `log S` of shape `(P,)`, `-inf` where there is no past.
        past_count (`torch.Tensor`, *optional*): `N` of shape `(P,)`.

    Returns:
        `torch.Tensor`: shape `(P, G)`; `-inf` where the others have no evidence.
    """
    num_prompts, group_size = weights.shape
    if past_log_sum is None or past_count is None:
        past_log_sum = weights.new_full((num_prompts,), NEG_INF)
        past_count = weights.new_zeros(num_prompts)
    weights = weights.masked_fill(~valid, NEG_INF)
    itself = torch.eye(group_size, dtype=torch.bool, device=weights.device)
    siblings = weights.unsqueeze(1).expand(-1, group_size, -1).masked_fill(itself, NEG_INF)  # (P, i, j != i)
    past = past_log_sum.unsqueeze(1)  # (P, 1)
    count = past_count.unsqueeze(1) + valid.sum(dim=1, keepdim=True)  # (P, 1)
    others_count = count - valid.to(count.dtype)  # (P, G)
    from_others = torch.logaddexp(siblings.logsumexp(dim=2), past) - others_count.log()
    from_all = torch.logaddexp(weights.logsumexp(dim=1, keepdim=True), past) - count.log()
    log_z = torch.where(others_count > 0, from_others, from_all)
    return torch.where(count > 0, log_z, NEG_INF)


def bounded_leave_one_out_log_z(
    weights: torch.Tensor,
    valid: torch.Tensor,
    past_log_sum: torch.Tensor | None = None,
    past_count: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    [`leave_one_out_log_z`] for lone successes, too: `Z_i = max(Z_{-i}, 3/4 Z_all)`, `Z_all` the mean of all weights.

    For a lone success `Z_{-i}` is as small as its siblings' weights, and `E[w_i / Z_{-i}]` as large as hundreds times
    `w_i / Z` (0/1 reward at `beta = 0.1`, 16 completions, success rates of .01 to .2: 190 to 511). The second term
    acts only where one sample holds more than about a quarter of the weight, and bounds its ratio by 4/3 times the
    number of samples. At the posterior all weights are equal: the fixed point stays where it is. 3/4 is a compromise
    between bias (largest with 1) and variance (largest with less): `trl-bayes bench gradients` has the errors for
    rewards of 0 and 1.

    Arguments as of [`leave_one_out_log_z`].

    Returns:
        `torch.Tensor`: shape `(P, G)`; `-inf` only where the prompt has no evidence at all.
    """
    without = leave_one_out_log_z(weights, valid, past_log_sum, past_count)
    of_all = pooled_log_z(weights, valid, past_log_sum, past_count).unsqueeze(1)
    return torch.maximum(without, of_all + _LEAST_OF_ALL)


def bounded_fixed_log_z(log_z: torch.Tensor, number: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    A `Z` from `N` samples of its own, for a completion that contradicts it too: `max(Z, 3/4 (N Z + w_i) / (N + 1))`.

    The rule of [`bounded_leave_one_out_log_z`] for a completion that is alone with these samples: it acts on weights
    above `(N + 4)/3 Z`, and bounds `w_i / Z_i` by `4/3 (N + 1)`.

    Args:
        log_z, number (`torch.Tensor`): `log Z` and `N` of each prompt, `(P,)`.
        weights (`torch.Tensor`): log importance weights `(P, G)`; NaN where there is none.

    Returns:
        `torch.Tensor`: shape `(P, G)`.
    """
    log_z, number = log_z.unsqueeze(1), number.unsqueeze(1)
    of_all = torch.logaddexp(log_z + number.log(), weights.nan_to_num(nan=NEG_INF)) - (number + 1).log()
    return torch.maximum(log_z, of_all + _LEAST_OF_ALL)


def pooled_log_z(
    weights: torch.Tensor,
    valid: torch.Tensor,
    past_log_sum: torch.Tensor | None = None,
    past_count: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Marginal likelihood of each prompt from all of its weights, unbiased for `Z`: `log (S + sum_j w_j) / (N + n)`.

    Arguments as of [`leave_one_out_log_z`].

    Returns:
        `torch.Tensor`: shape `(P,)`; `-inf` for a prompt without evidence (or without a valid completion).
    """
    log_sum, count = weights.masked_fill(~valid, NEG_INF).logsumexp(dim=1), valid.sum(dim=1).to(weights.dtype)
    if past_log_sum is not None and past_count is not None:
        log_sum, count = torch.logaddexp(log_sum, past_log_sum), count + past_count
    return log_mean(log_sum, count)


def log_mean(log_sum: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The log of a mean, from the log of the sum and the number, of any shape; `-inf` for the mean of nothing."""
    return torch.where(count > 0, log_sum - count.log(), NEG_INF)


def effective_sample_size(
    weights: torch.Tensor,
    valid: torch.Tensor,
    log_z: torch.Tensor | None = None,
    log_ratio: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Kish's effective sample size as a fraction of the group: `(sum w)^2 / (n sum w^2)`, shape `(P,)`, in [0, 1].

    A group cannot see what it has missed. Where `Z` is known to be larger than the group's mean weight, one more
    sample is assumed to bring what is missing: with `w_{n+1} = (n+1) Z - sum w` it is the effective size of `n + 1`
    samples, whose mean weight is `Z`.

    Where the samples are those of a `q` that is not the policy, that of samples of the policy is
    `(sum w)^2 / (sum rho sum w^2 / rho)` with `rho = pi/q`.

    Args:
        weights (`torch.Tensor`): log importance weights `log P - log q`, `(P, G)`.
        valid (`torch.Tensor`): boolean `(P, G)`.
        log_z (`torch.Tensor`, *optional*): `log Z` of each prompt `(P,)`, in nats; defaults to the group's own.
        log_ratio (`torch.Tensor`, *optional*): `log rho` `(P, G)`; 0 by default, where the policy is `q` itself.

    Returns:
        `torch.Tensor`: shape `(P,)`; 0 for a group without evidence.
    """
    weights = weights.masked_fill(~valid, NEG_INF)
    log_ratio = torch.zeros_like(weights) if log_ratio is None else log_ratio.masked_fill(~valid, 0.0)
    count = (log_ratio.exp() * valid).sum(dim=1)  # (P,)
    if log_z is not None:
        total = weights.logsumexp(dim=1)
        expected = log_z.to(weights) + (count + 1).log()
        missing = expected + torch.log1p(-(total - expected).clamp(max=0.0).exp())  # -inf where nothing is
        is_missing = missing > NEG_INF
        weights = torch.cat([weights, torch.where(is_missing, missing, NEG_INF).unsqueeze(1)], dim=1)
        log_ratio = torch.cat([log_ratio, torch.zeros_like(total).unsqueeze(1)], dim=1)
        count = count + is_missing
    squares = (2 * weights - log_ratio).logsumexp(dim=1)
    fraction = (2 * weights.logsumexp(dim=1) - squares).exp() / torch.where(count > 0, count, 1.0)
    return torch.nan_to_num(fraction, nan=0.0)
