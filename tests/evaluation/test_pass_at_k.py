"""pass@k against the sum over all outcomes: unbiased, and with the right variance."""

import itertools
import math

import pytest
import torch

from trl_bayes.evaluation.pass_at_k import pass_at_k, pass_at_k_estimates


def binomial(n: int, share: float) -> torch.Tensor:
    law = [math.comb(n, c) * share**c * (1 - share) ** (n - c) for c in range(n + 1)]
    return torch.tensor(law, dtype=torch.float64)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 3), (5, 5), (40, 10)])
def test_it_is_unbiased(n: int, k: int) -> None:
    """Its expectation over all numbers of right completions is exactly 1 - (1 - p)^k."""
    value, _ = pass_at_k(torch.arange(n + 1), torch.full((n + 1,), n), k)
    for share in (0.0, 0.03, 0.5, 1.0):
        assert (binomial(n, share) * value).sum().item() == pytest.approx(1 - (1 - share) ** k, abs=1e-12)


def test_it_counts_subsets() -> None:
    right = [True, False, False, True, False, False]
    for k in (1, 2, 4, 6):
        subsets = list(itertools.combinations(right, k))
        value, _ = pass_at_k(torch.tensor([2]), torch.tensor([6]), k)
        assert value.item() == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_variance_is_that_of_repetitions(k: int) -> None:
    n, share = 200, 0.05
    law = binomial(n, share)
    values, variances = pass_at_k(torch.arange(n + 1), torch.full((n + 1,), n), k)
    truth = (law * (values - (law * values).sum()) ** 2).sum()
    typical = (law * variances).sum()
    assert 0.8 < (typical / truth).item() < 1.3


def test_it_has_an_error_where_all_are_wrong_or_right() -> None:
    for correct in (0, 50):
        value, variance = pass_at_k(torch.tensor([correct]), torch.tensor([50]), 1)
        assert value.item() == correct / 50 and 0.01 < variance.sqrt().item() < 0.05


def test_too_few_completions() -> None:
    value, variance = pass_at_k(torch.tensor([1, 1]), torch.tensor([3, 4]), 4)
    assert value.isnan().tolist() == [True, False] and variance.isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        pass_at_k(torch.tensor([1]), torch.tensor([3]), 0)


def test_estimates_over_prompts() -> None:
    """Rewards that are missing are left out, and one that is not 0 or 1 has no pass@k."""
    nan = math.nan
    rewards = torch.tensor([[1.0, 0.3], [0.0, 1.0], [nan, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]).double()
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    estimates = pass_at_k_estimates(rewards, ["a", "b"], index, 2, [1, 2, 3])
    assert list(estimates) == ["pass_at_1/a", "pass_at_2/a", "pass_at_3/a"]
    assert estimates["pass_at_1/a"].value == 0.25 and estimates["pass_at_2/a"].value == 0.5
    assert estimates["pass_at_2/a"].trusted and estimates["pass_at_2/a"].standard_error > 0
    assert not estimates["pass_at_3/a"].trusted and "fewer than 3 samples" in estimates["pass_at_3/a"].note
    assert list(pass_at_k_estimates(rewards[:, :1], ["a"], index, 2, [1])) == ["pass_at_1"]
    assert pass_at_k_estimates(rewards[2:3, :1], ["a"], index[2:3], 2, [1]) == {}
