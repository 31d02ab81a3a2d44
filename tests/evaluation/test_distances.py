"""The distances against sums over all outcomes: bias, coverage, and errors of second order next to the posterior.

Prior and policies are tables over 300 outcomes of 4 prompts; samples are drawn from them, 400 of each prompt. Over 100
seeds an estimate whose 2 standard errors cover the truth with probability .95 does so at least 88 times, but for one
in a thousand; the seeds are fixed.
"""

import math
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from trl_bayes.benchmarks.enumeration import PolicyFit, compare, exact_posterior, mean_fit
from trl_bayes.evaluation.distances import (
    PolicySamples,
    PosteriorSamples,
    forward_kl,
    reverse_kl,
    reverse_kl_inside,
    total_variation,
)
from trl_bayes.evaluation.posterior import rejection
from trl_bayes.statistics.estimate import Estimate, stratified_mean
from trl_bayes.statistics.log_z import log_z_per_prompt


NUM_PROMPTS, NUM_OUTCOMES, NUM_SAMPLES, NUM_SEEDS = 4, 300, 400, 100
LEAST_COVERED = 88
SHAPE = (NUM_PROMPTS, NUM_OUTCOMES)
KINDS = ("rejection", "importance", "constraint")
INDEX = torch.arange(NUM_PROMPTS).repeat_interleave(NUM_SAMPLES)


class World(NamedTuple):
    """Prior, log-potential and a policy, (P, outcomes) each, and the bound of rejection if there is one."""

    log_prior: Tensor
    phi: Tensor
    log_policy: Tensor
    bound: float | None


class Run(NamedTuple):
    """What the samples of one seed give: with the control variate, and the plain means."""

    estimates: dict[str, Estimate]
    plain: dict[str, Estimate]


def policies(log_prior: Tensor, phi: Tensor, other: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """From the posterior itself to one that has nothing to do with it."""
    log_p = (log_prior + phi).log_softmax(dim=1)
    is_some = noise > 1.8  # 4 % of the outcomes
    floor = torch.where(phi.isneginf(), -3.0, phi)
    return {
        "the posterior": log_p,
        "next to it": torch.where(phi.isneginf(), -math.inf, log_p.clamp(min=-50) + 0.1 * noise).log_softmax(dim=1),
        "near it": torch.where(phi.isneginf(), -math.inf, log_p.clamp(min=-50) + 0.4 * noise).log_softmax(dim=1),
        "leaking": torch.logaddexp(log_p + math.log(0.99), other + math.log(0.01)),
        "lacking some": torch.where(is_some, log_p - 6, log_p).log_softmax(dim=1),
        "liking some": torch.where(is_some, log_prior + floor + 3, log_p).log_softmax(dim=1),
        "halfway": (log_prior + phi.clamp(min=-3) / 2).log_softmax(dim=1),
        "the prior": log_prior,
        "too sharp": (3 * log_p.clamp(min=-50)).log_softmax(dim=1),
        "collapsed": (10 * log_p.clamp(min=-50)).log_softmax(dim=1),
        "another": other,
    }


POLICIES = list(policies(*torch.zeros(4, 1, 1)))


def make(kind: str, policy: str) -> World:
    generator = torch.Generator().manual_seed(3)
    log_prior, other = (torch.randn(SHAPE, generator=generator).double().log_softmax(dim=1) for _ in range(2))
    noise = torch.randn(SHAPE, generator=generator).double()
    rewards = torch.rand(SHAPE, generator=generator).double()
    phi = torch.where(rewards < 0.6, -math.inf, 0.0) if kind == "constraint" else 2 * rewards
    bound = {"constraint": 0.0, "rejection": 2.0, "importance": None}[kind]
    return World(log_prior, phi, policies(log_prior, phi, other, noise)[policy], bound)


def truth(w: World) -> PolicyFit:
    """With the reverse divergence inside the support where it is infinite."""
    posteriors = [exact_posterior(*rows) for rows in zip(w.log_prior, w.phi, strict=True)]
    fit = mean_fit([compare(*pair) for pair in zip(posteriors, w.log_policy, strict=True)])
    if fit.reverse_kl < math.inf:
        return fit
    inside = w.log_policy.masked_fill(w.phi.isneginf(), -math.inf).log_softmax(dim=1)
    conditioned = mean_fit([compare(*pair) for pair in zip(posteriors, inside, strict=True)])
    return fit._replace(reverse_kl=conditioned.reverse_kl)


def draw(table: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(table.exp(), NUM_SAMPLES, replacement=True, generator=generator)  # (P, n)


def run(w: World, seed: int) -> Run:
    drawn, of_policy = draw(w.log_prior, seed), draw(w.log_policy, 10_000 + seed)
    phi = w.phi.gather(1, drawn).flatten()
    z = log_z_per_prompt(phi, INDEX, NUM_PROMPTS, w.bound)
    log_posterior = w.log_prior + w.phi - z.log_z.unsqueeze(1)  # (P, outcomes), with the estimated Z
    weights = (phi - z.log_z[INDEX]).exp()
    shares = weights
    if w.bound is not None:
        shares = torch.zeros_like(weights).index_fill(0, rejection(phi, w.bound, seed), 1.0)
    log_ratio = w.log_policy - log_posterior
    samples = PosteriorSamples(log_ratio.gather(1, drawn).flatten(), shares, weights, INDEX)
    policy = PolicySamples(log_ratio.gather(1, of_policy).flatten(), INDEX)
    inside = ~policy.log_ratio.isposinf()
    reverse = reverse_kl(policy, z, samples) if inside.all() else reverse_kl_inside(policy, z, samples)
    share = torch.bincount(INDEX[inside], minlength=NUM_PROMPTS) / NUM_SAMPLES
    mean = stratified_mean((policy.log_ratio - share.log()[INDEX])[inside], INDEX[inside], NUM_PROMPTS)
    variance = (z.variance + (1 / share - 1) / NUM_SAMPLES).sum() / NUM_PROMPTS**2
    error = math.sqrt(mean.standard_error**2 + variance.item())
    return Run(
        {
            "forward_kl": forward_kl(samples, z, policy),
            "reverse_kl": reverse,
            "total_variation": total_variation(samples, z, policy),
        },
        {
            "forward_kl": forward_kl(samples, z),
            "reverse_kl": mean._replace(standard_error=error),
            "total_variation": total_variation(samples, z),
        },
    )


@cache
def runs(kind: str, policy: str) -> list[Run]:
    w = make(kind, policy)
    return [run(w, seed) for seed in range(NUM_SEEDS)]


class Summary(NamedTuple):
    """Of the estimates of one quantity over all seeds."""

    bias: float
    spread: float
    standard_error: float  # the mean of those that are reported
    covered: int


def summarize(estimates: list[Estimate], value: float) -> Summary:
    values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
    errors = torch.tensor([estimate.standard_error for estimate in estimates], dtype=torch.float64)
    assert all(estimate.trusted for estimate in estimates), estimates[0]
    covered = ((values - value).abs() <= 2 * errors).sum()
    return Summary(values.mean().item() - value, values.std().item(), errors.mean().item(), int(covered))


def summaries(kind: str, policy: str, metric: str) -> tuple[Summary, Summary]:
    every, value = runs(kind, policy), getattr(truth(make(kind, policy)), metric)
    return (
        summarize([run.estimates[metric] for run in every], value),
        summarize([run.plain[metric] for run in every], value),
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_standard_errors_cover_the_truth_and_the_fit_never_loses(kind: str, policy: str) -> None:
    exact = truth(make(kind, policy))
    for metric in ("forward_kl", "reverse_kl", "total_variation"):
        ours, plain = summaries(kind, policy, metric)
        assert ours.spread <= 1.1 * plain.spread, (metric, ours, plain)
        if metric == "total_variation" and exact.total_variation < 5 * ours.standard_error:
            continue  # a mean of absolute values is never below zero: it errs upwards, as the plain one does
        assert ours.covered >= LEAST_COVERED, (metric, ours)
        assert abs(ours.bias) <= ours.standard_error / 3 + 3 * ours.spread / math.sqrt(NUM_SEEDS), (metric, ours)


@pytest.mark.parametrize("policy", ["the posterior", "next to it", "leaking"])
@pytest.mark.parametrize(("kind", "times"), [("rejection", 6), ("importance", 10), ("constraint", 9)])
def test_errors_next_to_the_posterior_are_of_second_order(kind: str, times: float, policy: str) -> None:
    """Also where log Z is not well known, as of the constraint, and where the policy has a little mass elsewhere."""
    for metric in ("forward_kl", "reverse_kl"):
        ours, plain = summaries(kind, policy, metric)
        assert ours.standard_error < plain.standard_error / times, (metric, ours, plain)
        assert ours.spread < plain.spread / times, (metric, ours, plain)
    ours, plain = summaries(kind, policy, "total_variation")
    assert ours.standard_error < plain.standard_error / 1.5


def test_mass_that_no_sample_shows_is_allowed_for() -> None:
    """Of two policies that differ where neither was sampled, the estimates are equal: so their error must be."""
    w = make("rejection", "the posterior")
    estimate = run(w, 0).estimates["reverse_kl"]
    per_prompt = NUM_SAMPLES * w.log_prior.exp().mul((w.phi - 2).exp()).sum(dim=1).mean().item()  # exact samples
    assert estimate.standard_error > 0.5 / per_prompt / math.sqrt(NUM_PROMPTS)


def test_infinite_distances() -> None:
    index = torch.zeros(60, dtype=torch.int64)
    z = log_z_per_prompt(torch.zeros(60), index, 1)
    zeros, ones = torch.zeros(60).double(), torch.ones(60).double()
    samples, policy = PosteriorSamples(zeros, ones, ones, index), PolicySamples(zeros, index)
    lacking = samples._replace(log_ratio=zeros.clone().index_fill(0, torch.tensor([3]), -math.inf))
    assert forward_kl(lacking, z, policy).value == math.inf and forward_kl(lacking, z).note
    assert total_variation(lacking, z).value == pytest.approx(1 / 60)
    no_share = lacking._replace(shares=(lacking.log_ratio > -1).double())
    assert forward_kl(no_share, z, policy).value == pytest.approx(0)
    outside = PolicySamples(zeros.clone().index_fill(0, torch.tensor([3]), math.inf), index)
    assert reverse_kl(outside, z, samples).value == math.inf and reverse_kl(outside, z, samples).note
    assert math.isfinite(reverse_kl_inside(outside, z, samples).value)
