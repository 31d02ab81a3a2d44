"""Exact laws on enumerated completions: what is known in closed form, and brute force where nothing is."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes.benchmarks.descent import descend
from trl_bayes.benchmarks.enumeration import enumerate_completions
from trl_bayes.benchmarks.fitted import all_log_probs, fitted
from trl_bayes.benchmarks.laws import (
    at_kl,
    beats,
    best_of_n_law,
    cumulative,
    entropy,
    expected,
    expected_distinct,
    kl,
    mixed_by_token,
    tilt,
)
from trl_bayes.benchmarks.tiny import EnumerableTask, letter_count_task
from trl_bayes.divergences import get_divergence
from trl_bayes.estimators import ImportanceWeights, PureRL
from trl_bayes.samplers import kl_of_best_of_n


LAW = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
TIED = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_with_ties_is_what_all_draws_give(n: int) -> None:
    found = torch.zeros(4, dtype=torch.float64)
    for drawn in itertools.product(range(4), repeat=n):
        best = max(TIED[y].item() for y in drawn)
        winners = [y for y in drawn if TIED[y] == best]
        for y in winners:
            found[y] += LAW[list(drawn)].sum().exp() / len(winners)
    torch.testing.assert_close(best_of_n_law(LAW, TIED, n).exp(), found)


def test_best_of_n_without_ties_has_the_known_kl_and_win_rate() -> None:
    """log N - (N-1)/N and N/(N+1), the closer the finer the prior; with ties both are smaller."""
    fine = torch.full((4000,), 1 / 4000, dtype=torch.float64).log()
    rewards = torch.randperm(4000, generator=torch.Generator().manual_seed(0)).double()
    for n in (2, 4, 16):
        best = best_of_n_law(fine, rewards, n)
        assert kl(best, fine).item() == pytest.approx(kl_of_best_of_n(n), abs=1e-4)
        assert beats(best, fine, rewards).item() == pytest.approx(n / (n + 1), abs=1e-4)
        tied = (rewards > 3000).double()
        assert kl(best_of_n_law(fine, tied, n), fine).item() < kl_of_best_of_n(n) - 0.05


def test_tilts_of_a_given_kl_win_most_if_they_tilt_the_rank() -> None:
    """Of all laws at a distance the tilt of u has the largest win rate."""
    best = best_of_n_law(LAW, TIED, 3)
    nats = kl(best, LAW).item()
    u = cumulative(LAW, TIED).middle
    by_rank = at_kl(lambda beta: tilt(LAW, u, beta), LAW, nats)
    assert kl(by_rank, LAW).item() == pytest.approx(nats, abs=1e-6)
    assert beats(by_rank, LAW, TIED) > beats(best, LAW, TIED) > 0.5
    assert beats(LAW, LAW, TIED).item() == pytest.approx(0.5)


def test_numbers_of_a_law() -> None:
    certain = torch.tensor([1.0, 0.0]).double().log()
    assert expected(certain, torch.tensor([3.0, math.inf])).item() == 3.0
    assert entropy(certain).item() == 0.0 and expected_distinct(certain, 50).item() == pytest.approx(1.0)
    half = torch.tensor([0.5, 0.5]).double().log()
    assert entropy(half).item() == pytest.approx(math.log(2))
    assert expected_distinct(half, 2).item() == pytest.approx(1.5)
    assert kl(certain, half).item() == pytest.approx(math.log(2)) and kl(half, certain).item() == math.inf


def test_mixing_by_token() -> None:
    """One law alone is itself; two letters, mixed token by token by hand."""
    completions = enumerate_completions([0], 1, 2)  # "", "a", "a a"
    p = torch.tensor([[0.5, 0.2, 0.3]]).double().log()
    q = torch.tensor([[0.1, 0.6, 0.3]]).double().log()
    torch.testing.assert_close(mixed_by_token(completions, [p, q], [1.0, 0.0]), p)
    first = torch.tensor([0.5 * 0.1, 0.5 * 0.9]).double().sqrt()  # end, or "a"
    then = torch.tensor([0.4 * (2 / 3), 0.6 * (1 / 3)]).double().sqrt()
    first, then = first / first.sum(), then / then.sum()
    expected_law = torch.stack([first[0], first[1] * then[0], first[1] * then[1]])
    torch.testing.assert_close(mixed_by_token(completions, [p, q], [0.5, 0.5]).exp()[0], expected_law)


# ---------------------------------------------------------------------------------------------------------------------
# Models


TASK: EnumerableTask = replace(letter_count_task(), letters="ab", max_completion_length=3, prompts=("a", "b", "b a"))


def test_a_fit_and_a_descent_reach_the_posterior_and_pure_rl_does_not(tmp_path: object) -> None:
    path = TASK.build_model(f"{tmp_path}/prior")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    log_prior, rewards = TASK.log_probs(model, tokenizer), TASK.rewards(tokenizer)
    torch.testing.assert_close(all_log_probs(model, TASK, tokenizer).detach(), log_prior, rtol=0, atol=1e-5)
    posterior = tilt(log_prior, rewards, 1.0)
    close = TASK.log_probs(fitted(model, TASK, tokenizer, posterior, steps=30), tokenizer)
    assert kl(posterior, close).mean() < 0.02 < 0.1 < kl(posterior, log_prior).mean()
    descents = {
        estimator: descend(TASK, estimator, rewards, steps=30, evaluate_at=[0])
        for estimator in (ImportanceWeights(get_divergence("forward_kl")), PureRL(get_divergence("reverse_kl")))
    }
    ends = []
    for found in descents.values():
        assert found.steps == (0, 30)
        torch.testing.assert_close(found.log_policies[0], log_prior, rtol=0, atol=1e-5)
        ends.append(kl(posterior, found.log_policies[-1]).mean().item())
    assert ends[0] < 0.05 and ends[1] > 1
