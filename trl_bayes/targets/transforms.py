"""Transforms Phi of a calibrated reward u, and the laws that they give when the reward is continuous."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..rewards.specification import with_numbers


_DEFAULT_KL_BUDGET = 0.5  # nats


@dataclass(frozen=True)
class Transform:
    """
    A function `Phi(u)` of the calibrated reward `u` in (0, 1), the quantile of a reward under the prior.

    Args:
        name (`str`): how it is written; two transforms of the same name are the same.
        function (`Callable`): `Phi`, elementwise on tensors, finite and free of overflow on (0, 1).
        default_beta (`float`, *optional*): temperature that gives the law which the transform is named after.
        log_mean (`Callable`, *optional*):
            `log_mean(a, b, beta)`, the log of the mean of `exp(Phi(u)/beta)` over `a < u < b`, for a transform that
            stands for a law of ranks: completions with the same reward share the quantiles from `a` to `b`, and
            together they get the probability that the law gives to these. Without it they all have the one `u` in the
            middle.
    """

    name: str
    function: Callable[[torch.Tensor], torch.Tensor] = field(compare=False)
    default_beta: float | None = field(default=None, compare=False)
    log_mean: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None = field(default=None, compare=False)

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        return self.function(u)

    def __repr__(self) -> str:
        return self.name


def best_of_n(n: int) -> Transform:
    """
    `Phi = log u`: with the default `beta = 1/(N-1)` the law of the best of `n` prior samples, density `N u^(N-1)`.

    See https://huggingface.co/papers/2407.06057. `Z = 1/N`, `KL(p||pi_0) = log N - (N-1)/N`, win rate `N/(N+1)`.
    Exact with ties too: a class of completions with the same reward, on the quantiles from `a` to `b`, has the
    probability `b^N - a^N` to be the best, so `phi = log[(b^N - a^N) / (N (b - a))]`.
    """
    name = f"best_of_n(n={_at_least_two('best_of_n', n)})"
    return Transform(name, torch.log, 1 / (n - 1), _log_mean_power)


def worst_of_n(n: int) -> Transform:
    """
    `Phi = log(1 - u)`: with the default `beta = 1/(N-1)` the law of the worst of `n` prior samples.

    [`best_of_n`] from the other end, ties included.
    """
    name = f"worst_of_n(n={_at_least_two('worst_of_n', n)})"
    return Transform(
        name, lambda u: torch.log1p(-u), 1 / (n - 1), lambda a, b, beta: _log_mean_power(1 - b, 1 - a, beta)
    )


def _log_mean_power(a: torch.Tensor, b: torch.Tensor, beta: float) -> torch.Tensor:
    """Log of the mean of `u^(1/beta)` over `a < u < b`: `log[(b^c - a^c) / (c (b - a))]` with `c = 1 + 1/beta`."""
    c = 1 + 1 / beta
    return c * b.log() + (-torch.expm1(c * (a.log() - b.log()))).log() - math.log(c) - (b - a).log()


def ctrl_best_of_n(t: float = 10.0) -> Transform:
    """`Phi = exp(t u)`: InfAlign-CTRL's for best-of-N sampling afterwards (https://huggingface.co/papers/2412.19792)."""
    t = _rate("ctrl_best_of_n", t)
    return Transform(f"ctrl_best_of_n(t={t})", lambda u: (t * u).exp())


def ctrl_worst_of_n(t: float = 10.0) -> Transform:
    """`Phi = -exp(-t u)`: InfAlign-CTRL's against worst-of-N attacks (https://huggingface.co/papers/2412.19792)."""
    t = _rate("ctrl_worst_of_n", t)
    return Transform(f"ctrl_worst_of_n(t={t})", lambda u: -(-t * u).exp())


def identity() -> Transform:
    """`Phi = u`: QRPO's (https://huggingface.co/papers/2507.08068), `Z = beta (exp(1/beta) - 1)`."""
    return Transform("identity()", lambda u: u)


_BY_NAME: dict[str, Callable[..., Transform]] = {
    factory.__name__: factory for factory in (best_of_n, worst_of_n, ctrl_best_of_n, ctrl_worst_of_n, identity)
}


def build_transform(transform: str | Transform, **arguments: Any) -> Transform:
    """
    A transform from its name and arguments, `build_transform("best_of_n", n=4)`; a [`Transform`] is taken as it is.

    Raises:
        ValueError: unknown name, or arguments that the transform does not take.
    """
    if isinstance(transform, Transform):
        if arguments:
            raise ValueError(f"The transform {transform} is already made, so {sorted(arguments)} cannot be set.")
        return transform
    if not isinstance(transform, str) or transform not in _BY_NAME:
        raise ValueError(f"Unknown transform {transform!r}: use one of {sorted(_BY_NAME)} or a `Transform`.")
    try:
        inspect.signature(_BY_NAME[transform]).bind(**arguments)
    except TypeError as error:
        takes = list(inspect.signature(_BY_NAME[transform]).parameters)
        raise ValueError(f"The transform {transform!r} takes {takes}: {error}.") from None
    return _BY_NAME[transform](**with_numbers(_BY_NAME[transform], arguments, f"the transform {transform!r}"))


def _at_least_two(name: str, n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"`{name}` needs a whole number `n` of at least 2 (best of how many), got {n!r}.")
    return n


def _rate(name: str, t: float) -> float:
    if not 0 < t <= 50:  # so written, NaN is refused too
        raise ValueError(f"`{name}` needs `t` in (0, 50] (InfAlign-CTRL uses 10, and 5 for a small N), got {t}.")
    return float(t)


class CalibratedLaw(NamedTuple):
    """
    Where a calibrated target stands when the reward is continuous, from the density of `u` alone.

    `beta`, `log_z` `log Z` and `kl_prior` `KL(p||pi_0)` in nats; `win_rate`, the probability that a sample of
    `p` has a higher reward than one of the prior; `best_of_n` and `worst_of_n`, the same for the best (worst) of `n`
    samples of either.
    """

    beta: float
    log_z: float
    kl_prior: float
    win_rate: float
    best_of_n: float
    worst_of_n: float


_GRID = 20_000


def calibrated_law(transform: Transform, beta: float, n: int = 4) -> CalibratedLaw:
    """
    The law `p(u) = exp(Phi(u)/beta) / Z` on (0, 1), by the midpoint rule.

    Args:
        transform ([`Transform`]): `Phi`.
        beta (`float`): temperature.
        n (`int`, *optional*, defaults to `4`): how many samples the best and the worst are taken of.

    Returns:
        [`CalibratedLaw`]
    """
    u = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
    phi = transform(u) / beta
    log_z = (phi.logsumexp(dim=0) - math.log(_GRID)).item()
    mass = (phi - phi.logsumexp(dim=0)).exp()
    below = mass.cumsum(dim=0)  # the probability of a cell and all below it
    best = below.pow(n).diff(prepend=below.new_zeros(1))
    worst = (1 - below + mass).pow(n) - (1 - below).clamp(min=0).pow(n)
    return CalibratedLaw(
        beta=beta,
        log_z=log_z,
        kl_prior=(mass * phi).sum().item() - log_z,
        win_rate=(mass * u).sum().item(),
        best_of_n=(best * u.pow(n)).sum().item(),
        worst_of_n=(worst * (1 - (1 - u).pow(n))).sum().item(),
    )


def beta_for_kl(transform: Transform, kl_prior: float) -> float:
    """
    The temperature at which a calibrated target is `kl_prior` nats from the prior, if the reward is continuous.

    `KL(p||pi_0)` falls from infinity to 0 as `beta` grows, so bisection finds it. This is how targets are compared at
    equal cost, and how to choose `beta` for transforms whose scale says nothing (`exp(10 u)` reaches 22,000).

    Raises:
        ValueError: if `kl_prior` is not in (0, 5].
    """
    if not 0 < kl_prior <= 5:
        raise ValueError(f"`kl_prior` must lie in (0, 5] nats, got {kl_prior}.")
    low, high = math.log(1e-8), math.log(1e12)
    for _ in range(100):
        middle = (low + high) / 2
        if calibrated_law(transform, math.exp(middle)).kl_prior > kl_prior:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def temperature(transform: Transform, beta: float | None, kl_budget: float | None) -> float:
    """
    The temperature of a calibrated target, from itself or from how far the posterior may be from the prior.

    Args:
        transform ([`Transform`]): `Phi`.
        beta (`float`, *optional*): in units of the transform per nat.
        kl_budget (`float`, *optional*): `KL(p||pi_0)` in nats, in (0, 5]. Defaults to 0.5 where `beta` is unset too.

    Raises:
        ValueError: numbers out of range, or that do not go together; one sentence.
    """
    if kl_budget is not None and not 0 < kl_budget <= 5:
        raise ValueError(f"`kl_budget={kl_budget}` must lie in (0, 5] nats: 0.5 is usual.")
    if beta is None:
        return beta_for_kl(transform, kl_budget or _DEFAULT_KL_BUDGET)
    if not beta > 0:
        raise ValueError(f"`beta={beta}` is not a temperature of CTRL: set a positive number, or `kl_budget` instead.")
    if kl_budget is not None and not math.isclose(beta, implied := beta_for_kl(transform, kl_budget), rel_tol=1e-6):
        raise ValueError(
            f"`kl_budget={kl_budget}` asks for `beta={implied:.6g}`, but `beta={beta}` is set: leave one of them out."
        )
    return beta
