"""Divergences: each closed form against its definition (autograd, quadrature, enumeration), limits, errors."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.textbook import TEXTBOOK, kl
from trl_bayes.divergences import (
    DIVERGENCES,
    Divergence,
    _dilogarithm_of_minus_exp,
    get_divergence,
)


INF = math.inf
NAMED = tuple(name for name in DIVERGENCES if name != "alpha")
ALPHAS = (-1.5, -1.0, -1e-3, 0.0, 1e-30, 1e-9, 0.3, 0.5, 0.7, 1 - 1e-9, 1.0, 1.004, 1.5, 2.0, 3.0)
ALL = [get_divergence(name) for name in NAMED] + [get_divergence("alpha", alpha=a) for a in ALPHAS]
IDS = list(NAMED) + [f"alpha={a}" for a in ALPHAS]
FUNCTIONS = ("f", "f_over_t", "slope", "loss", "loss_slope")

every_divergence = pytest.mark.parametrize("divergence", ALL, ids=IDS)
log_ratios = st.floats(-6, 6)


def for_all(**strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], Any]:
    """A property over the strategies; no deadline, for a loaded machine is not a failure."""
    return lambda test: settings(deadline=None, max_examples=50, derandomize=True)(given(**strategies)(test))


def scalar(value: float, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=requires_grad)


def derivative(function: Callable[[Tensor], Tensor], at: float, dtype: torch.dtype = torch.float64) -> float:
    u = scalar(at, dtype, requires_grad=True)
    return torch.autograd.grad(function(u), u)[0].item()


def integral(function: Callable[[np.ndarray], np.ndarray], low: float, high: float, panels: int = 16) -> float:
    """Composite Gauss-Legendre, accurate to rounding for the smooth integrands below."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(low, high, panels + 1)
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    points = middle[:, None] + half[:, None] * nodes
    return float((function(points) * weights * half[:, None]).sum())


# Definitions


@pytest.mark.parametrize("name", NAMED)
@for_all(t=st.floats(1e-3, 1e3))
def test_f_and_slope_are_the_textbook_ones(name: str, t: float) -> None:
    divergence, textbook, x = get_divergence(name), TEXTBOOK[name], scalar(t)
    assert divergence.f(x.log()).item() == pytest.approx(textbook.f(x).item(), rel=1e-9, abs=1e-11)
    if name != "total_variation" or abs(t - 1) > 1e-9:
        assert divergence.slope(x.log()).item() == pytest.approx(textbook.slope(x).item(), rel=1e-9, abs=1e-11)
    assert divergence.slope_at_infinity == textbook.slope_at_infinity


@for_all(a=st.floats(-3, 4).filter(lambda a: abs(a) > 0.05 and abs(a - 1) > 0.05), t=st.floats(1e-2, 1e2))
def test_alpha_f_and_slope_are_the_textbook_ones(a: float, t: float) -> None:
    divergence, u = get_divergence("alpha", alpha=a), scalar(t).log()
    scale = 1 + t + t**a
    assert divergence.f(u).item() == pytest.approx(
        (t**a - a * t - (1 - a)) / (a * (a - 1)), rel=1e-9, abs=1e-9 * scale
    )
    assert divergence.slope(u).item() == pytest.approx((t ** (a - 1) - 1) / (a - 1), rel=1e-9, abs=1e-11)


@for_all(
    a=st.one_of(
        st.floats(-2, 3),
        st.builds(
            lambda near, e, sign: near + sign * 10.0**e,
            st.sampled_from([0.0, 1.0]),
            st.integers(-16, -2),
            st.sampled_from([-1, 0, 1]),
        ),
    ),
    u=st.floats(-5, 5),
)
def test_alpha_is_accurate_and_continuous_at_forward_and_reverse_kl(a: float, u: float) -> None:
    """Against integrals of f''(t) = t^(a-2), which have nothing singular at a = 0 and a = 1."""
    divergence, x = get_divergence("alpha", alpha=a), scalar(u)
    slope = integral(lambda s: np.exp((a - 1) * s), 0, u)
    loss = integral(lambda s: (u - s) * np.exp((a - 1) * s), 0, u)
    f = integral(lambda s: (math.exp(u) - np.exp(s)) * np.exp((a - 1) * s), 0, u)
    assert divergence.slope(x).item() == pytest.approx(slope, rel=1e-12)
    assert divergence.loss(x).item() == pytest.approx(loss, rel=1e-12)
    assert divergence.f(x).item() == pytest.approx(f, rel=1e-10, abs=1e-14)
    assert divergence.f_over_t(x).item() == pytest.approx(f * math.exp(-u), rel=1e-10, abs=1e-14)


@for_all(u=log_ratios)
def test_special_alphas_are_multiples_of_the_named_divergences(u: float) -> None:
    x = scalar(u)
    for a, name, factor in ((0.5, "squared_hellinger", 2), (2.0, "pearson_chi2", 0.5), (-1.0, "neyman_chi2", 0.5)):
        alpha, named = get_divergence("alpha", alpha=a), get_divergence(name)
        for function in FUNCTIONS:
            expected = factor * getattr(named, function)(x).item()
            assert getattr(alpha, function)(x).item() == pytest.approx(expected, rel=1e-9, abs=1e-12), (name, function)


@for_all(u=log_ratios)
def test_alpha_one_and_zero_are_the_kls_up_to_a_linear_term(u: float) -> None:
    x = scalar(u)
    for a, name, linear in ((1.0, "reverse_kl", -1.0), (0.0, "forward_kl", 1.0)):
        alpha, named = get_divergence("alpha", alpha=a), get_divergence(name)
        assert alpha.f(x).item() == pytest.approx(named.f(x).item() + linear * math.expm1(u), rel=1e-9, abs=1e-12)
        assert alpha.slope(x).item() == pytest.approx(named.slope(x).item() + linear, rel=1e-9, abs=1e-12)
        assert alpha.loss(x).item() == named.loss(x).item()


# The five functions fit together


@every_divergence
def test_at_one(divergence: Divergence) -> None:
    zero = scalar(0.0)
    assert divergence.f(zero) == 0
    assert divergence.f_over_t(zero) == 0
    assert divergence.loss(zero) == 0
    assert divergence.slope(zero) == divergence.slope_at_one
    assert divergence.loss_slope(zero) == 0
    assert derivative(divergence.loss, 0.0) == 0


@every_divergence
@for_all(u=log_ratios)
def test_slope_is_the_derivative_of_f_with_respect_to_t(divergence: Divergence, u: float) -> None:
    if divergence.name == "total_variation" and abs(u) < 1e-9:
        return  # the kink
    with_respect_to_t = derivative(lambda t: divergence.f(t.log()), math.exp(u))
    assert divergence.slope(scalar(u)).item() == pytest.approx(with_respect_to_t, rel=1e-9, abs=1e-9)


@every_divergence
@for_all(u=log_ratios)
def test_f_over_t(divergence: Divergence, u: float) -> None:
    expected = divergence.f(scalar(u)).item() * math.exp(-u)
    assert divergence.f_over_t(scalar(u)).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@every_divergence
@for_all(u=log_ratios)
def test_loss_is_the_integral_of_its_slope(divergence: Divergence, u: float) -> None:
    """By quadrature: autograd alone would not see a wrong value, for the gradient is taken from the slope."""
    expected = integral(lambda s: divergence.loss_slope(torch.from_numpy(s)).numpy(), 0, u)
    loss = divergence.loss(scalar(u)).item()
    assert loss == pytest.approx(expected, rel=1e-10, abs=1e-14 * abs(u) + 1e-300)
    assert loss >= 0


@every_divergence
@for_all(u=st.floats(-1e4, 1e4))
def test_gradient_of_loss_is_its_slope(divergence: Divergence, u: float) -> None:
    assert derivative(divergence.loss, u) == divergence.loss_slope(scalar(u)).item()
    assert derivative(divergence.loss, u, torch.float32) == divergence.loss_slope(scalar(u, torch.float32)).item()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_stays_the_integral_of_its_slope_where_exponents_are_clamped(
    divergence: Divergence, dtype: torch.dtype
) -> None:
    for u in (-9000.0, -2000.0, 2000.0, 9000.0):
        expected = integral(lambda s: divergence.loss_slope(torch.from_numpy(s).to(dtype)).double().numpy(), 0, u, 500)
        assert divergence.loss(scalar(u, dtype)).item() == pytest.approx(expected, rel=2e-3)


@every_divergence
@for_all(u=st.floats(-1e4, 1e4), v=st.floats(-1e4, 1e4))
def test_slope_is_monotone_and_the_loss_convex_in_sign(divergence: Divergence, u: float, v: float) -> None:
    low, high = divergence.slope(torch.tensor([min(u, v), max(u, v)], dtype=torch.float64)).tolist()
    assert low <= high + 1e-12 * abs(high)
    assert divergence.loss_slope(scalar(u)).item() * u >= 0
    assert divergence.loss(scalar(u)).item() >= 0
    if divergence.slope_at_infinity < INF:
        assert high <= divergence.slope_at_infinity * (1 + 1e-15)


@every_divergence
def test_second_derivative_and_functional_transforms_of_the_loss(divergence: Divergence) -> None:
    u = torch.tensor([-2.0, -0.3, 0.0, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(divergence.loss(u).sum(), u, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum() + 0 * u.sum(), u)
    step = 1e-5
    expected = (divergence.slope(u + step) - divergence.slope(u - step)) / (2 * step)
    if divergence.name == "total_variation":
        expected = torch.zeros_like(u)
    torch.testing.assert_close(curvature, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(divergence.loss))(u), divergence.loss_slope(u))


# Limits and safety


@every_divergence
def test_limits_outside_the_targets_support(divergence: Divergence) -> None:
    u = scalar(INF)
    assert divergence.slope(u).item() == divergence.slope_at_infinity
    assert divergence.f_over_t(u).item() == divergence.slope_at_infinity
    assert divergence.loss(u).item() == INF
    assert divergence.f(u).item() == (-INF if divergence.name == "forward_kl" else INF)
    assert derivative(divergence.loss, INF) == divergence.slope_at_infinity - divergence.slope_at_one
    assert divergence.allows_hard_constraints == math.isfinite(divergence.slope_at_infinity)


@every_divergence
def test_limits_outside_the_policys_support(divergence: Divergence) -> None:
    u = scalar(-INF)
    assert divergence.loss(u).item() == INF
    assert divergence.f_over_t(u).item() == (-INF if divergence.name == "reverse_kl" else INF)


@every_divergence
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_approach_their_limits(divergence: Divergence, sign: int, function: str) -> None:
    limit, near = (getattr(divergence, function)(scalar(sign * u)).item() for u in (INF, 600.0))
    if abs(limit) > 100:  # infinite, or an alpha next to 0 or 1, which takes long to get there
        assert near * math.copysign(1, limit) > 100
    else:
        assert near == pytest.approx(limit, rel=1e-12, abs=1e-12)


def test_which_divergences_allow_hard_constraints() -> None:
    finite = {
        "forward_kl": 0.0,
        "jensen_shannon": math.log(2) / 2,
        "total_variation": 0.5,
        "squared_hellinger": 1.0,
        "neyman_chi2": 1.0,
    }
    for name in NAMED:
        assert get_divergence(name).allows_hard_constraints == (name in finite)
        assert get_divergence(name).slope_at_infinity == finite.get(name, INF)
    assert get_divergence("alpha", alpha=0.75).slope_at_infinity == 4
    assert get_divergence("alpha", alpha=-1).slope_at_infinity == 0.5
    assert not get_divergence("alpha", alpha=1).allows_hard_constraints
    assert not get_divergence("alpha", alpha=2).allows_hard_constraints


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_for_extreme_finite_log_ratios(divergence: Divergence, dtype: torch.dtype) -> None:
    u = torch.tensor([-1e4, -1e3, -400.0, -90.0, -45.0, 0.0, 45.0, 90.0, 400.0, 1e3, 1e4], dtype=dtype)
    for function in FUNCTIONS:
        v = u.clone().requires_grad_()
        values = getattr(divergence, function)(v)
        assert values.dtype == dtype
        assert values.shape == u.shape
        assert values.isfinite().all(), (function, values)
        if values.requires_grad:
            assert torch.autograd.grad(values.sum(), v)[0].isfinite().all(), function
    assert divergence.slope(u).square().isfinite().all()  # so that a variance or a gradient norm can be formed
    if divergence.allows_hard_constraints:
        assert divergence.slope(u[-1:]).item() <= divergence.slope_at_infinity * (1 + 1e-6)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_log_ratios_never_give_nan(divergence: Divergence, dtype: torch.dtype) -> None:
    for function in FUNCTIONS:
        u = torch.tensor([-INF, 0.5, INF], dtype=dtype, requires_grad=True)
        values = getattr(divergence, function)(u)
        assert not values.isnan().any(), function
        if values.requires_grad:
            assert not torch.autograd.grad(values.sum(), u)[0].isnan().any(), function


@every_divergence
def test_masked_samples_get_no_gradient(divergence: Divergence) -> None:
    u = torch.tensor([-INF, 0.5, INF], dtype=torch.float64, requires_grad=True)
    torch.where(u.isfinite(), divergence.loss(u), 0.0).sum().backward()
    assert u.grad is not None
    assert u.grad.tolist() == [0.0, divergence.loss_slope(scalar(0.5)).item(), 0.0]


@every_divergence
def test_nan_stays_nan(divergence: Divergence) -> None:
    for function in FUNCTIONS:
        assert getattr(divergence, function)(scalar(math.nan)).isnan(), function


@every_divergence
def test_any_shape(divergence: Divergence) -> None:
    for shape in ((), (0,), (3,), (2, 0), (2, 3)):
        for function in FUNCTIONS:
            assert getattr(divergence, function)(torch.full(shape, 0.25)).shape == shape


@every_divergence
@for_all(u=st.floats(-8, 8, width=32))
def test_float32_is_accurate(divergence: Divergence, u: float) -> None:
    for function, absolute in (("f", 1e-6), ("f_over_t", 1e-6), ("slope", 1e-6), ("loss", 0.0)):
        exact = getattr(divergence, function)(scalar(u)).item()
        single = getattr(divergence, function)(scalar(u, torch.float32)).item()
        # f, f/t cancel between terms of size 1, t, 1/t; the loss is accurate relative to itself, also near 0.
        floor = absolute * (1 + math.exp(abs(u)) * function.startswith("f")) + 1e-37
        assert single == pytest.approx(exact, rel=2e-5, abs=floor), function


# Enumeration


probabilities = st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5).map(lambda v: np.array(v) / np.sum(v))


@pytest.mark.parametrize("name", NAMED)
@for_all(pi=probabilities, p=probabilities)
def test_divergence_of_two_enumerated_distributions(name: str, pi: np.ndarray, p: np.ndarray) -> None:
    divergence, expected = get_divergence(name), TEXTBOOK[name].of(pi, p)
    u = torch.from_numpy(np.log(pi) - np.log(p))
    assert (torch.from_numpy(p) * divergence.f(u)).sum().item() == pytest.approx(expected, abs=1e-11, rel=1e-11)
    assert (torch.from_numpy(pi) * divergence.f_over_t(u)).sum().item() == pytest.approx(
        expected, abs=1e-11, rel=1e-11
    )


@for_all(pi=probabilities, p=probabilities, a=st.sampled_from(ALPHAS))
def test_alpha_divergence_of_two_enumerated_distributions(pi: np.ndarray, p: np.ndarray, a: float) -> None:
    divergence = get_divergence("alpha", alpha=a)
    if min(abs(a), abs(a - 1)) > 0.1:
        expected = (float((pi**a * p ** (1 - a)).sum()) - 1) / (a * (a - 1))
        tolerance = 1e-10
    else:
        expected = kl(pi, p) if a > 0.5 else kl(p, pi)
        tolerance = 1e-10 + 30 * min(abs(a), abs(a - 1))
    u = torch.from_numpy(np.log(pi) - np.log(p))
    under_target = (torch.from_numpy(p) * divergence.f(u)).sum().item()
    assert under_target == pytest.approx(expected, abs=tolerance, rel=1e-10)
    under_policy = (torch.from_numpy(pi) * divergence.f_over_t(u)).sum().item()
    assert under_policy == pytest.approx(under_target, abs=1e-10, rel=1e-10)


@every_divergence
def test_pseudo_reward_and_on_policy_loss_give_the_gradient_of_the_divergence(divergence: Divergence) -> None:
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    log_p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    log_pi = logits.log_softmax(0)
    pi, u = log_pi.exp().detach(), log_pi - log_p
    (exact,) = torch.autograd.grad((log_p.exp() * divergence.f(u)).sum(), logits, retain_graph=True)
    (score,) = torch.autograd.grad((pi * divergence.slope(u).detach() * log_pi).sum(), logits, retain_graph=True)
    (loss,) = torch.autograd.grad((pi * divergence.loss(u)).sum(), logits)
    torch.testing.assert_close(score, exact)
    torch.testing.assert_close(loss, exact)


# The dilogarithm


@for_all(v=st.floats(-30, 30))
def test_dilogarithm_against_quadrature(v: float) -> None:
    """Li2(-e^v) = -integral_{-inf}^v log(1 + e^s) ds."""
    expected = -integral(lambda s: np.logaddexp(0, s), min(v, 0) - 40, v, 32)
    assert _dilogarithm_of_minus_exp(scalar(v)).item() == pytest.approx(expected, rel=1e-11)


def test_dilogarithm_at_minus_one() -> None:
    assert _dilogarithm_of_minus_exp(scalar(0.0)).item() == pytest.approx(-(math.pi**2) / 12, rel=1e-14)


# Errors


def test_names() -> None:
    assert DIVERGENCES == (*TEXTBOOK, "alpha")
    for name in NAMED:
        assert get_divergence(name).name == name
    assert get_divergence("alpha", alpha=0.5).name == "alpha"


def test_unknown_name_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(ValueError, match="did you mean 'jensen_shannon'") as error:
        get_divergence("jensen-shanon")
    assert all(name in str(error.value) for name in DIVERGENCES)
    with pytest.raises(ValueError, match="Unknown divergence 'xyzzy': set `divergence` to one of forward_kl"):
        get_divergence("xyzzy")


def test_alpha_missing() -> None:
    with pytest.raises(ValueError, match="set `alpha` to a number"):
        get_divergence("alpha")


def test_alpha_with_another_name() -> None:
    with pytest.raises(ValueError, match="`alpha=0.5` has no meaning for divergence='reverse_kl'"):
        get_divergence("reverse_kl", alpha=0.5)


@pytest.mark.parametrize("alpha", [math.nan, INF, -INF])
def test_alpha_not_finite(alpha: float) -> None:
    with pytest.raises(ValueError, match="is not a finite number"):
        get_divergence("alpha", alpha=alpha)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match="float32 or float64"):
            getattr(get_divergence("reverse_kl"), function)(torch.zeros(2, dtype=dtype))


def test_a_divergence_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        get_divergence("reverse_kl").name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in ("alpha", "total_variation")])
def test_curvature_is_the_second_derivative_at_one(name: str) -> None:
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    divergence = get_divergence(name)
    (slope,) = torch.autograd.grad(divergence.slope(log_t), log_t)  # d f'(e^u) / du = t f''(t), at t = 1
    assert slope.item() == pytest.approx(divergence.curvature, abs=1e-12)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_alpha_divergences_have_unit_curvature(alpha: float) -> None:
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    divergence = get_divergence("alpha", alpha=alpha)
    (slope,) = torch.autograd.grad(divergence.slope(log_t), log_t)
    assert slope.item() == pytest.approx(divergence.curvature, abs=1e-12) == 1.0
