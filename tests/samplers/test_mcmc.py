"""Both kernels leave the posterior as it is, exactly, and chains come as near to it as theory says."""

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from trl_bayes.samplers import MetropolisHastings
from trl_bayes.samplers.mcmc import (
    Kernel,
    autocorrelation_time,
    log_acceptance,
    metropolis_hastings_step,
    split_r_hat,
)
from trl_bayes.targets import Constraint, Target, Tilt


def transition_matrix(source: Any, kernel: Kernel) -> Tensor:
    """K (15, 15) of the first prompt: every cut, every new end, accepted as the sampler accepts."""
    outcomes, candidates = source.outcomes(), source.all_candidates(0)
    size = len(outcomes)
    rows, columns = (grid.flatten() for grid in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    accept = log_acceptance(candidates.select(rows), candidates.select(columns), kernel).exp().view(size, size)
    propose = torch.zeros(size, size, dtype=torch.float64)
    log_q = source.log_proposal(0)
    for i, y in enumerate(outcomes):
        cuts = range(len(y)) if kernel == "prefix" else range(1)
        for cut in cuts:
            shares = [j for j in range(size) if outcomes[j][:cut] == y[:cut] and len(outcomes[j]) > cut]
            propose[i, shares] += log_q[shares].softmax(dim=0) / len(cuts)
    assert propose.sum(dim=1).allclose(torch.ones(size, dtype=torch.float64))
    moves = propose * accept
    return moves + torch.diag(1 - moves.sum(dim=1))


@pytest.mark.parametrize("proposal_seed", [None, 40], ids=["prior", "proposal"])
@pytest.mark.parametrize("target", [Tilt(0.7), Constraint(threshold=1.0)], ids=["soft", "hard"])
@pytest.mark.parametrize("kernel", ["prefix", "independence"])
def test_the_posterior_is_stationary(
    kernel: Kernel, target: Target, proposal_seed: int | None, table_source: Any
) -> None:
    source = table_source(target, proposal_seed)
    p, matrix = source.posterior(0), transition_matrix(source, kernel)
    assert (p @ matrix - p).abs().max() < 1e-10
    flow = p.unsqueeze(1) * matrix  # detailed balance
    assert (flow - flow.T).abs().max() < 1e-10
    reached = torch.linalg.matrix_power(matrix, 2**16)
    assert (reached - p).abs().max() < 1e-6  # from every start


def test_without_the_lengths_it_would_not_be(table_source: Any) -> None:
    """The test above sees the factor of lengths."""
    source = table_source(Tilt(0.7))
    p, matrix = source.posterior(0), transition_matrix(source, "prefix")
    lengths = source.all_candidates(0).lengths
    weights = source.all_candidates(0).log_weights
    wrong = (weights.unsqueeze(0) - weights.unsqueeze(1)).clamp(max=0).exp()
    right = (weights.unsqueeze(0) - weights.unsqueeze(1) + (lengths.unsqueeze(1) / lengths).log()).clamp(max=0).exp()
    moves = (matrix - torch.diag(matrix.diagonal())) / right * wrong
    assert (p @ (moves + torch.diag(1 - moves.sum(dim=1))) - p).abs().max() > 1e-3


@pytest.mark.parametrize("kernel", ["prefix", "independence"])
def test_a_step_has_this_transition_matrix(
    kernel: Kernel, table_source: Any, p_value: Any, rng: numpy.random.Generator
) -> None:
    """What is simulated is what the matrix says; chi-square tests that fail once in 10,000."""
    source = table_source(Tilt(0.7), 40)
    matrix, outcomes = transition_matrix(source, kernel), source.outcomes()
    for start in (0, 4, 9, 14):
        state = source.all_candidates(0).select(torch.full((4000,), start))
        moved, accepted = metropolis_hastings_step(source, state, kernel, rng)
        assert p_value(source.frequencies(moved.completion_ids), matrix[start]) > 1e-4, outcomes[start]
        stayed = torch.tensor([tuple(row) == outcomes[start] for row in moved.completion_ids])
        assert stayed[~accepted].all()


@pytest.mark.parametrize("kernel", ["prefix", "independence"])
def test_the_error_falls_as_promised(kernel: Kernel, table_source: Any, rng: numpy.random.Generator) -> None:
    source = table_source(Tilt(0.4), num_prompts=1)
    p, start, matrix = source.posterior(0), source.log_proposal(0).exp(), transition_matrix(source, kernel)
    worst_ratio = (source.all_candidates(0).log_weights.max() - source.log_z(0)).exp().item()  # M
    measured = []
    for steps in (1, 4, 16, 64):
        exact = start @ torch.linalg.matrix_power(matrix, steps)
        error = (exact - p).abs().sum().item() / 2
        draws = MetropolisHastings(kernel, num_steps=steps).draw(source, 3000, rng)
        law = source.frequencies(draws.completion_ids) / 3000
        assert (law - exact).abs().sum().item() / 2 < 0.04  # noise of 3,000 samples: about 0.02
        if kernel == "independence":
            assert error <= (1 - 1 / worst_ratio) ** steps + 1e-12
        measured.append((law - p).abs().sum().item() / 2)
    assert measured[0] > 0.1 and measured[0] > measured[1] > measured[2] and measured[3] < 0.05


def test_few_chains_give_several_draws_each(table_source: Any, p_value: Any, rng: numpy.random.Generator) -> None:
    source = table_source(Tilt(0.7))
    draws = MetropolisHastings(num_steps=30, num_chains=200, thin=20).draw(source, 1000, rng)
    assert torch.bincount(draws.prompt_index).tolist() == [1000, 1000]
    for p in range(2):
        assert p_value(source.frequencies(source.of_prompt(draws, p)), source.posterior(p)) > 1e-4
    assert draws.diagnostics["num_steps"] == 30 + 4 * 20 and draws.diagnostics["num_chains"] == 200
    assert 0.2 < draws.diagnostics["acceptance_rate"] < 1
    for name in ("log_potential", "length"):
        assert draws.diagnostics["r_hat"][name] == pytest.approx(1, abs=0.2)
        assert 1 <= draws.diagnostics["autocorrelation_steps"][name] < 20


def test_chains_look_for_evidence(table_source: Any, rng: numpy.random.Generator) -> None:
    source = table_source(Constraint(threshold=3.5))  # impossible for the first prompt, aaa for the second
    draws = MetropolisHastings("independence", num_steps=100).draw(source, 20, rng)
    assert set(draws.texts) == {"aaa"} and set(draws.prompt_index.tolist()) == {1}
    assert draws.diagnostics["num_chains_without_evidence"] == 40 - len(draws) >= 20
    assert draws.diagnostics["r_hat"]["log_potential"] is None


def test_acceptance_without_evidence(table_source: Any) -> None:
    candidates = table_source(Constraint(threshold=1.0)).all_candidates(0)
    none = torch.nonzero(candidates.phi.isneginf()).flatten()[:1]
    some = torch.nonzero(candidates.phi == 0).flatten()[:1]
    for a, b, expected in ((none, some, 1.0), (some, none, 0.0), (none, none, 1.0), (some, some, 1.0)):
        value = log_acceptance(candidates.select(a), candidates.select(b), "independence").exp().item()
        assert value == expected


def test_diagnostics_of_chains() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 8, generator=generator, dtype=torch.float64)
    assert split_r_hat(noise) == pytest.approx(1, abs=0.01)
    assert split_r_hat(noise + torch.arange(8)) > 2  # chains that never meet
    assert split_r_hat(noise + torch.linspace(0, 5, 2000).unsqueeze(1)) > 1.3  # chains that have not settled
    assert autocorrelation_time(noise) == pytest.approx(1, abs=0.1)
    autoregressive = [noise[0]]
    for step in noise[1:]:
        autoregressive.append(0.8 * autoregressive[-1] + step)
    assert autocorrelation_time(torch.stack(autoregressive)) == pytest.approx((1 + 0.8) / (1 - 0.8), rel=0.15)
    for values in (torch.ones(20, 2), torch.full((20, 2), -math.inf), noise[:3]):
        assert math.isnan(split_r_hat(values)) and math.isnan(autocorrelation_time(values))


def test_what_is_refused() -> None:
    for wrong in ({"kernel": "gibbs"}, {"num_steps": 0}, {"num_chains": 0}, {"thin": 0}):
        with pytest.raises(ValueError):
            MetropolisHastings(**wrong)
