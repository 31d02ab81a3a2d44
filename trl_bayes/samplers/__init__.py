"""
The posterior at decoding time: the same targets, sampled without training.

A [`Sampler`] applies a method to models: [`BestOfN`], [`Rejection`], [`QuasiRejection`], [`MetropolisHastings`],
[`SequentialMonteCarlo`], [`Importance`], which weights samples of the prior, or [`Realigned`] and [`Proxy`], which
weight those of trained policies whose logits are mixed with the prior's.
"""

from ..language_models.completions import Completions
from ..language_models.settings import SamplingSettings
from .base import Method, Mixture, setting
from .best_of_n import BestOfN, kl_of_best_of_n
from .importance import Importance
from .mcmc import MetropolisHastings
from .proxy import Proxy
from .quasi_rejection import QuasiRejection, TradeOff, trade_off
from .realigned import Realigned
from .rejection import Rejection
from .sampler import Sampler
from .smc import SequentialMonteCarlo
from .source import CompletionSource, SamplingError


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Importance,
        BestOfN,
        Rejection,
        QuasiRejection,
        MetropolisHastings,
        SequentialMonteCarlo,
        Realigned,
        Proxy,
    )
}
"""Methods by the name that `trl-bayes sample --method` takes."""

__all__ = [
    "METHODS",
    "BestOfN",
    "Completions",
    "CompletionSource",
    "Importance",
    "Method",
    "MetropolisHastings",
    "Mixture",
    "Proxy",
    "QuasiRejection",
    "Realigned",
    "Rejection",
    "Sampler",
    "SamplingError",
    "SamplingSettings",
    "SequentialMonteCarlo",
    "TradeOff",
    "kl_of_best_of_n",
    "setting",
    "trade_off",
]
