"""Bias and variance of a gradient estimator from many independent draws of it, with their standard errors."""

import math
from typing import NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """Of an estimator of the gradient of one group, each with its standard error, in squared units of the gradient."""

    squared_bias: float
    """`|E[g_hat] - g|^2`, estimated without the variance of the mean, so that it may be below zero; `NaN` where the
    exact gradient is not known."""
    squared_bias_error: float
    variance: float
    """`E|g_hat - E[g_hat]|^2`."""
    variance_error: float


def gradient_moments(draws: Tensor, exact: Tensor | None) -> Moments:
    """
    The moments of an estimator.

    With `e_i` the draws minus the exact gradient the squared bias is the mean of `e_i . e_j` over `i != j`, which is
    unbiased; its standard error is the jackknife's.

    Args:
        draws (`torch.Tensor`): independent draws `(n, D)`, at least 3.
        exact (`torch.Tensor`, *optional*): the gradient `(D,)`.
    """
    number = len(draws)
    deviations = (draws - draws.mean(dim=0)).square().sum(dim=1).double()  # (n,)
    variance = deviations.sum().item() / (number - 1)
    variance_error = deviations.std().item() / math.sqrt(number)
    if exact is None:
        return Moments(math.nan, math.nan, variance, variance_error)
    errors = (draws - exact).double()
    products = errors @ errors.T  # (n, n)
    products.fill_diagonal_(0.0)
    rows, total = products.sum(dim=1), products.sum()
    squared_bias = total / (number * (number - 1))
    without = (total - 2 * rows) / ((number - 1) * (number - 2))  # the same estimate without each of the draws
    error = ((number - 1) / number * (without - without.mean()).square().sum()).sqrt()
    return Moments(squared_bias.item(), error.item(), variance, variance_error)
