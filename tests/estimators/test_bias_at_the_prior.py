"""How far the first visit's estimate of Z puts gradients off, at the prior: the figures of the README and the docs."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.outcomes import coefficient_of
from trl_bayes.benchmarks.tiny import EnumerableTask, balance_task, bigram_task, letter_count_task
from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import ImportanceWeights
from trl_bayes.groups import bounded_leave_one_out_log_z, leave_one_out_log_z


DPG = ImportanceWeights(get_divergence("forward_kl"))
G = 16
NUM_GROUPS = 20_000
PHI = 10.0  # a 0/1 reward at beta = 0.1


def gradient(probability: Tensor, coefficient: Tensor) -> Tensor:
    """`E[c grad log pi]` in the logits of a table, from the mean coefficient of each outcome."""
    return probability * (coefficient - (probability * coefficient).sum())


def mean_coefficients(weight_probability: Tensor, log_weights: Tensor) -> Tensor:
    """`E[c | own weight]` of DPG for each distinct weight, over siblings that are drawn from the prior."""
    siblings = torch.multinomial(weight_probability, NUM_GROUPS * (G - 1), replacement=True).view(NUM_GROUPS, G - 1)
    means = []
    for own in log_weights:
        weights = torch.cat([own.expand(NUM_GROUPS, 1), log_weights[siblings]], dim=1)
        log_z = bounded_leave_one_out_log_z(weights, torch.ones_like(weights, dtype=torch.bool))[:, 0]
        zeros = torch.zeros_like(log_z)
        means.append(coefficient_of(DPG, zeros, weights[:, 0], zeros, log_z).mean())
    return torch.stack(means)


@pytest.mark.parametrize(
    ("task", "beta", "expected"),
    [(letter_count_task(), 0.7, 0.304), (bigram_task(), 0.5, 0.128), (balance_task(), 0.6, 0.066)],
    ids=["letters", "bigrams", "balance"],
)
def test_of_the_exact_tasks(task: EnumerableTask, beta: float, expected: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = task.build_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    log_prior = task.log_probs(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    log_weights, which = (task.rewards(tokenizer) / beta).unique(return_inverse=True)
    exact, biased = [], []
    for prior in log_prior.exp():
        probability = torch.zeros_like(log_weights).index_add(0, which, prior)
        z = (probability * log_weights.exp()).sum()
        exact.append(gradient(prior, (1 - log_weights.exp() / z)[which]))
        biased.append(gradient(prior, mean_coefficients(probability, log_weights)[which]))
    bias = (torch.stack(biased) - torch.stack(exact)).norm() / torch.stack(exact).norm()
    assert bias.item() == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize(("rate", "expected"), [(0.01, -0.810), (0.05, -0.277), (0.1, 0.058), (0.2, 0.235)])
def test_of_a_reward_of_0_or_1(rate: float, expected: float) -> None:
    """By enumeration of the number of successes in a group."""
    weights = torch.where(torch.arange(G) < torch.arange(G + 1).unsqueeze(1), PHI, 0.0).double()
    probability = torch.tensor([math.comb(G, k) * rate**k * (1 - rate) ** (G - k) for k in range(G + 1)]).double()
    zeros = torch.zeros_like(weights)
    log_z = bounded_leave_one_out_log_z(weights, torch.ones_like(weights, dtype=torch.bool))
    score = (weights == PHI).double() - rate  # grad log pi in the logit of a success
    mean = (probability * (coefficient_of(DPG, zeros, weights, zeros, log_z) * score).mean(dim=1)).sum()
    z = rate * math.exp(PHI) + 1 - rate
    exact = rate * (1 - rate) * (1 - math.exp(PHI)) / z
    assert (mean / exact - 1).item() == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize(
    ("group_size", "rule", "expected"),
    [
        (4, bounded_leave_one_out_log_z, 0.216),
        (16, bounded_leave_one_out_log_z, 0.057),
        (16, leave_one_out_log_z, 0.022),
    ],
    ids=["4", "16", "16-without-the-rule"],
)
def test_of_trajectory_balance_with_completions_of_the_prior(
    group_size: int, rule: Callable[..., Tensor], expected: float, letters_prior: str
) -> None:
    """
    `KL(p||pi)` of the table of logits that they leave where it is on average.

    There `q (log pi/p + d) = pi E_q[log pi/p + d]`, with `d` the mean error of a completion's log Z.
    """
    torch.manual_seed(0)
    task, number = letter_count_task(), 4000
    tokenizer = AutoTokenizer.from_pretrained(letters_prior)
    log_prior = task.log_probs(AutoModelForCausalLM.from_pretrained(letters_prior), tokenizer)
    log_weights, which = (task.rewards(tokenizer) / 0.7).unique(return_inverse=True)
    distances = []
    for log_q in log_prior:
        probability = torch.zeros_like(log_weights).index_add(0, which, log_q.exp())
        log_z = (probability.log() + log_weights).logsumexp(0)
        drawn = torch.multinomial(probability, number * (group_size - 1), replacement=True).view(number, -1)
        errors = []
        for own in log_weights:
            weights = torch.cat([own.expand(number, 1), log_weights[drawn]], dim=1)
            found = rule(weights, torch.ones_like(weights, dtype=torch.bool))[:, 0]
            errors.append(found.mean() - log_z)
        log_posterior, error = log_q + log_weights[which] - log_z, torch.stack(errors)[which]
        logits = log_posterior
        for _ in range(1500):
            log_policy = logits.log_softmax(0)
            slope = log_policy - log_posterior + error
            mean, ratio = (log_q.exp() * slope).sum(), (log_policy - log_q).exp()
            residual = slope - ratio * mean
            logits = logits - 0.02 * residual / (1 + ratio * mean.abs())
        assert (log_q.exp() * residual).abs().max() < 1e-9
        distances.append((log_posterior.exp() * (log_posterior - log_policy)).sum())
    assert torch.stack(distances).mean().item() == pytest.approx(expected, abs=0.1 * expected)
