"""f-divergences between a policy and its target, as pure functions of `u = log t = log pi(y|x) - log p(y|x)`.

    D_f(pi||p) = E_p[f(t)],   f convex, f(1) = 0

Three things are done with a divergence, and each is one function of u here:

 - measure it: `f` under the target, `f_over_t` under the policy, since E_p[f(t)] = E_pi[f(t)/t];
 - follow its gradient, E_pi[f'(t) grad log pi]: `slope` is f'(t) (f-DPG, https://huggingface.co/papers/2302.08215);
 - minimize the off-policy loss with the same optimum and, on-policy, the same gradient: `loss` is
   L_f(u) = integral_0^u (f'(e^s) - f'(1)) ds (f-TB, https://huggingface.co/papers/2605.15417).

Numbers are in nats, tensors float32 or float64 of any shape; nothing here knows log Z, a baseline or a model.

Two facts hold for every function of the table:

 - An infinite u gives the mathematical limit: u = +inf is a sample outside the target's support, u = -inf one outside
   the policy's. A NaN stays NaN.
 - A finite u (up to 1e4 in size at least) gives a finite value. Exponents are clamped at half the dtype's range less 8
   (about 36 in float32, 347 in float64), so that the square of a slope is finite as well: beyond it the slope is
   constant, the loss goes on as a straight line with that slope, and `f`, `f_over_t` are huge but not exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .spelling import did_you_mean


__all__ = ["DIVERGENCES", "Divergence", "get_divergence"]

_LOG_2 = math.log(2)
_SMALLEST_EXPONENT_FACTOR = 1e-30  # smaller ones act as 0: they would underflow to 0/0 in float32
# B_2, B_4, ..., B_20
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798, -174611 / 330)


@dataclass(frozen=True)
class Divergence:
    """One f-divergence D_f(pi||p) = E_p[f(t)], as functions of `u = log t = log pi - log p`.

    Papers: https://huggingface.co/papers/2302.08215 (pseudo-reward), https://huggingface.co/papers/2605.15417 (loss).
    Every function maps a float32 or float64 tensor to one of the same shape and dtype, and raises `TypeError` for
    another dtype. Units: nats.

    Attributes:
        name: its name in `get_divergence`.
        f: f(t), the integrand under the target: D_f = E_p[f(t)].
        f_over_t: f(t)/t, the integrand under the policy: D_f = E_pi[f(t)/t]. At u = +inf it is `slope_at_infinity`.
        slope: f'(t); minus it is the pseudo-reward.
        loss: L_f(u) = integral_0^u (f'(e^s) - f'(1)) ds: zero at u = 0, positive elsewhere; its gradient
            is `loss_slope`.
        slope_at_one: f'(1).
        slope_at_infinity: limit of f'(t) for a sample outside the target's support; `math.inf` where there is none.
        curvature: f''(1). Near the target D_f is `curvature` times KL to second order, so dividing by it makes all
            divergences pull equally hard there. 1 for total variation, which has a kink instead.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    f_over_t: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor], Tensor]
    slope_at_one: float
    slope_at_infinity: float
    curvature: float

    @property
    def allows_hard_constraints(self) -> bool:
        """Whether a sample of zero target probability has a finite pseudo-reward, -f'(inf)."""
        return math.isfinite(self.slope_at_infinity)

    def loss_slope(self, u: Tensor) -> Tensor:
        """Derivative of the loss: L_f'(u) = f'(e^u) - f'(1)."""
        return self.slope(u) - self.slope_at_one


def get_divergence(name: str, alpha: float | None = None) -> Divergence:
    """The divergence of that name; see `DIVERGENCES` for the names.

    `alpha` is the exponent of Amari's family, f(t) = (t^a - a t - (1 - a)) / (a (a - 1)), and goes with the name
    "alpha" only. a = 1 is reverse KL and a = 0 forward KL, up to a multiple of t - 1 in f that changes neither D_f nor
    the loss; it shifts the slope by a constant, which a baseline takes away.

    Raises:
        ValueError: the name is unknown; `alpha` is missing, is not finite, or is given with another name.
    """
    if name not in DIVERGENCES:
        raise ValueError(
            f"Unknown divergence '{name}'{did_you_mean(name, DIVERGENCES)}: set `divergence` to one of "
            f"{', '.join(DIVERGENCES)}."
        )
    if name != "alpha":
        if alpha is not None:
            raise ValueError(
                f"`alpha={alpha}` has no meaning for divergence='{name}': remove it, or set `divergence='alpha'`."
            )
        return _TABLE[name]
    if alpha is None:
        raise ValueError(
            "divergence='alpha' needs its exponent: set `alpha` to a number, e.g. 0.5 (1 is reverse KL, 0 forward KL)."
        )
    if not math.isfinite(alpha):
        raise ValueError(f"`alpha={alpha}` is not a finite number: set `alpha` to one, e.g. 0.5.")
    return _alpha(float(alpha))


# Exponentials that stay finite


def _largest_exponent(dtype: torch.dtype) -> float:
    return math.log(torch.finfo(dtype).max) / 2 - 8


def _exp(x: Tensor) -> Tensor:
    return torch.exp(x.clamp(max=_largest_exponent(x.dtype)))


def _expm1(x: Tensor) -> Tensor:
    return torch.expm1(x.clamp(max=_largest_exponent(x.dtype)))


def _exp_integral(u: Tensor, c: float) -> Tensor:
    """integral_0^u e^(c s) ds = (e^(c u) - 1) / c, and u where c = 0."""
    return u if abs(c) < _SMALLEST_EXPONENT_FACTOR else _expm1(c * u) / c


def _exp_double_integral(u: Tensor, c: float) -> Tensor:
    """integral_0^u (e^(c s) - 1) / c ds = u^2 (e^x - 1 - x) / x^2 with x = c u, and u^2 / 2 where x = 0."""
    x = c * u
    small = x.abs() < 0.5  # there e^x - 1 - x cancels: sum its series x^2/2! + x^3/3! + ... instead
    series = _polynomial(x, [1 / math.factorial(k) for k in range(2, 16)])
    clamped = x.clamp(max=_largest_exponent(x.dtype))
    # Past the clamp the line (x - clamped) * e^clamped goes on: the integral of the clamped exponential.
    direct = (_expm1(x) * (1 + x - clamped) - clamped) / torch.where(small, 1.0, x).square()
    return u.square() * torch.where(small, series, direct)


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """coefficients[0] + coefficients[1] x + coefficients[2] x^2 + ..."""
    total = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total


# Jensen-Shannon


def _jensen_shannon_slope(u: Tensor) -> Tensor:
    """(log 2 - softplus(-u)) / 2, in a form that neither overflows nor cancels around u = 0."""
    return (torch.minimum(u, torch.zeros_like(u)) - torch.log1p(torch.expm1(-u.abs()) / 2)) / 2


def _jensen_shannon_f(u: Tensor) -> Tensor:
    """(t log t - (t + 1) log((t + 1) / 2)) / 2 = t f'(t) + f'(1/t)."""
    return _exp(u) * _jensen_shannon_slope(u) + _jensen_shannon_slope(-u)


def _jensen_shannon_loss(u: Tensor) -> Tensor:
    """(u log 2 - Li2(-e^-u) - pi^2 / 12) / 2."""
    closed_form = (u * _LOG_2 - _dilogarithm_of_minus_exp(-u) - math.pi**2 / 12) / 2
    # Around 0 its terms cancel: sum u^2/8 - (integral_0^u log cosh(s/2) ds) / 2 as a series instead.
    odd = [-(4**n - 1) * b / (4 * n * math.factorial(2 * n + 1)) for n, b in enumerate(_BERNOULLI, start=1)]
    series = u.square() * (1 / 8 + u * _polynomial(u.square(), odd))
    return torch.where(u.abs() < 0.5, series, closed_form)


def _dilogarithm_of_minus_exp(v: Tensor) -> Tensor:
    """Li2(-e^v), the dilogarithm of a negative argument given by its logarithm.

    For z in [-1, 0), Li2(z) = w - w^2/4 + sum_n B_2n w^(2n+1) / (2n+1)! with w = -log(1 - z); below -1 by inversion,
    Li2(z) = -pi^2/6 - log(-z)^2/2 - Li2(1/z).
    """
    w = -torch.log1p(torch.exp(-v.abs()))
    odd = [1.0] + [b / math.factorial(2 * n + 1) for n, b in enumerate(_BERNOULLI, start=1)]
    inside = w * _polynomial(w.square(), odd) - w.square() / 4
    return torch.where(v > 0, -(math.pi**2) / 6 - v.square() / 2 - inside, inside)


# Amari's alpha


def _alpha_f(u: Tensor, a: float) -> Tensor:
    """(t^a - a t - (1 - a)) / (a (a - 1)), in two equal forms: one has no 0/0 at a = 0, the other none at a = 1."""
    if a <= 0.5:
        return (_expm1(u) - _exp_integral(u, a)) / (1 - a)
    return -(_expm1(u) + _exp(u) * _exp_integral(-u, 1 - a)) / a


def _alpha(a: float) -> Divergence:
    return _divergence(
        "alpha",
        f=lambda u: _alpha_f(u, a),
        f_over_t=lambda u: _alpha_f(-u, 1 - a),  # duality: exchanging pi and p turns a into 1 - a
        slope=lambda u: _exp_integral(u, a - 1),
        loss=lambda u: _exp_double_integral(u, a - 1),
        slope_at_one=0.0,
        slope_at_infinity=1 / (1 - a) if a < 1 else math.inf,
        slope_at_zero=1 / (1 - a) if a > 1 else -math.inf,
        f_at_zero=1 / a if a > 0 else math.inf,
    )


# What every row of the table goes through


class _Integral(torch.autograd.Function):
    """The loss: its value from a closed form, its gradient from the slope, with no branch to differentiate."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, loss: Callable[[Tensor], Tensor], loss_slope: Callable[[Tensor], Tensor]) -> Tensor:
        return loss(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u, _, ctx.loss_slope = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (u,), (grad,) = ctx.saved_tensors, grad_outputs
        # A masked sample (grad 0) has gradient 0, though its slope may be infinite.
        return (grad * ctx.loss_slope(u)).masked_fill(grad == 0, 0.0), None, None


def _extend(function: Callable[[Tensor], Tensor], at_zero: float, at_infinity: float) -> Callable[[Tensor], Tensor]:
    """`function`, written for finite u, with its limits at t = 0 (u = -inf) and t = inf (u = +inf)."""

    def extended(u: Tensor) -> Tensor:
        if u.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"log t has dtype {u.dtype}: sum log-probabilities in float32 or float64.")
        finite = u.masked_fill(u.isinf(), 0.0)
        return function(finite).masked_fill(u == -math.inf, at_zero).masked_fill(u == math.inf, at_infinity)

    return extended


def _divergence(
    name: str,
    *,
    f: Callable[[Tensor], Tensor],
    f_over_t: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    slope_at_one: float,
    slope_at_infinity: float,
    curvature: float = 1.0,
    slope_at_zero: float = -math.inf,
    f_at_zero: float = math.inf,
    f_at_infinity: float = math.inf,
    f_over_t_at_zero: float = math.inf,
) -> Divergence:
    extended_slope = _extend(slope, slope_at_zero, slope_at_infinity)
    extended_loss = _extend(loss, math.inf, math.inf)
    return Divergence(
        name=name,
        f=_extend(f, f_at_zero, f_at_infinity),
        f_over_t=_extend(f_over_t, f_over_t_at_zero, slope_at_infinity),
        slope=extended_slope,
        loss=lambda u: _Integral.apply(u, extended_loss, lambda v: extended_slope(v) - slope_at_one),
        slope_at_one=slope_at_one,
        slope_at_infinity=slope_at_infinity,
        curvature=curvature,
    )


_TABLE: dict[str, Divergence] = {
    row.name: row
    for row in (
        _divergence(
            "forward_kl",  # KL(p||pi), f = -log t
            f=lambda u: -u,
            f_over_t=lambda u: -u * _exp(-u),
            slope=lambda u: -_exp(-u),
            loss=lambda u: _exp_double_integral(u, -1),  # u + e^-u - 1
            slope_at_one=-1.0,
            slope_at_infinity=0.0,
            f_at_infinity=-math.inf,
        ),
        _divergence(
            "reverse_kl",  # KL(pi||p), f = t log t
            f=lambda u: u * _exp(u),
            f_over_t=lambda u: u,
            slope=lambda u: 1 + u,
            loss=lambda u: u.square() / 2,
            slope_at_one=1.0,
            slope_at_infinity=math.inf,
            f_at_zero=0.0,
            f_over_t_at_zero=-math.inf,
        ),
        _divergence(
            "jensen_shannon",  # (KL(pi||m) + KL(p||m)) / 2 with m = (pi + p) / 2
            f=_jensen_shannon_f,
            f_over_t=lambda u: _jensen_shannon_f(-u),  # symmetric in pi and p
            slope=_jensen_shannon_slope,
            loss=_jensen_shannon_loss,
            slope_at_one=0.0,
            slope_at_infinity=_LOG_2 / 2,
            curvature=1 / 4,
            f_at_zero=_LOG_2 / 2,
        ),
        _divergence(
            "total_variation",  # f = |t - 1| / 2; f'(1) = 0 chosen among [-1/2, 1/2]
            f=lambda u: _expm1(u).abs() / 2,
            f_over_t=lambda u: _expm1(-u).abs() / 2,
            slope=lambda u: torch.where(u.isnan(), u, u.sign() / 2),  # sign(NaN) is 0
            loss=lambda u: u.abs() / 2,
            slope_at_one=0.0,
            slope_at_infinity=0.5,
            slope_at_zero=-0.5,
            f_at_zero=0.5,
        ),
        _divergence(
            "squared_hellinger",  # f = (sqrt t - 1)^2
            f=lambda u: _expm1(u / 2).square(),
            f_over_t=lambda u: _expm1(-u / 2).square(),
            slope=lambda u: -_expm1(-u / 2),
            loss=lambda u: _exp_double_integral(u, -0.5) / 2,  # u + 2 (e^(-u/2) - 1)
            slope_at_one=0.0,
            slope_at_infinity=1.0,
            curvature=1 / 2,
            f_at_zero=1.0,
        ),
        _divergence(
            "pearson_chi2",  # chi2(pi||p), f = (t - 1)^2
            f=lambda u: _expm1(u).square(),
            f_over_t=lambda u: -_expm1(u) * _expm1(-u),
            slope=lambda u: 2 * _expm1(u),
            loss=lambda u: 2 * _exp_double_integral(u, 1),  # 2 (e^u - 1 - u)
            slope_at_one=0.0,
            slope_at_infinity=math.inf,
            curvature=2.0,
            slope_at_zero=-2.0,
            f_at_zero=1.0,
        ),
        _divergence(
            "neyman_chi2",  # chi2(p||pi), f = (1 - t)^2 / t
            f=lambda u: -_expm1(u) * _expm1(-u),
            f_over_t=lambda u: _expm1(-u).square(),
            slope=lambda u: -_expm1(-2 * u),
            loss=lambda u: 2 * _exp_double_integral(u, -2),  # u + (e^(-2u) - 1) / 2
            slope_at_one=0.0,
            slope_at_infinity=1.0,
            curvature=2.0,
        ),
    )
}

DIVERGENCES: tuple[str, ...] = (*_TABLE, "alpha")
