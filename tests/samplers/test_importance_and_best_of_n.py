"""Samples with weights, and the best of N: their laws against enumeration."""

import math
from typing import Any

import numpy
import pytest
import torch

from trl_bayes.samplers import BestOfN, Importance, kl_of_best_of_n
from trl_bayes.targets import Constraint, Tilt


@pytest.mark.parametrize("proposal_seed", [None, 40])
def test_weights_make_the_posterior(
    proposal_seed: int | None, table_source: Any, p_value: Any, rng: numpy.random.Generator
) -> None:
    source = table_source(Tilt(0.7), proposal_seed)
    draws = Importance().draw(source, 20_000, rng)
    for p in range(2):
        mine = draws.prompt_index == p
        rows = source.of_prompt(draws, p)
        assert p_value(source.frequencies(rows), source.log_proposal(p).exp()) > 1e-4  # fails once in 10,000
        share = draws.log_weights[mine].softmax(dim=0)
        weighted = torch.zeros(15, dtype=torch.float64)
        place = {row: i for i, row in enumerate(source.outcomes())}
        weighted.index_add_(0, torch.tensor([place[tuple(row)] for row in rows]), share)
        assert (weighted - source.posterior(p)).abs().sum() / 2 < 0.03
    log_z = draws.diagnostics["log_z"]
    assert abs(log_z["value"] - (source.log_z(0) + source.log_z(1)) / 2) < 4 * log_z["standard_error"]


def test_best_of_n_has_its_law(table_source: Any, p_value: Any, rng: numpy.random.Generator) -> None:
    """With ties: the best has evidence phi with probability F(phi)^N - F(phi-)^N, and is q among its equals."""
    source = table_source(Tilt(0.7), num_prompts=1)
    size = 4
    draws = BestOfN(size).draw(source, 10_000, rng)
    phi, q = source.all_candidates(0).phi, source.log_proposal(0).exp()
    law = torch.zeros(15, dtype=torch.float64)
    for value in phi.unique():
        equal, below = phi == value, q[phi < value].sum()
        law[equal] = q[equal] / q[equal].sum() * ((below + q[equal].sum()) ** size - below**size)
    assert law.sum().item() == pytest.approx(1)
    observed = source.frequencies(draws.completion_ids)
    assert p_value(observed, law) > 1e-4  # fails once in 10,000
    assert p_value(observed, source.posterior(0)) < 1e-4  # it is not the posterior
    kl = (law * (law / q).log()).nansum().item()
    assert kl < draws.diagnostics["kl_to_proposal_at_most"] == pytest.approx(math.log(4) - 3 / 4)
    assert kl_of_best_of_n(1) == 0.0


def test_kl_of_best_of_n_is_that_of_a_continuous_reward() -> None:
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    density = 8 * u**7
    assert (density * density.log()).mean().item() == pytest.approx(kl_of_best_of_n(8), abs=1e-5)


def test_a_group_without_evidence_gives_no_draw(table_source: Any, rng: numpy.random.Generator) -> None:
    source = table_source(Constraint(threshold=2.0))
    draws = BestOfN(2).draw(source, 200, rng)
    assert 0 < len(draws) < 400 and draws.phi.eq(0).all()
    assert len(BestOfN(2).draw(table_source(Constraint(threshold=99.0)), 5, rng)) == 0
    with pytest.raises(ValueError, match="num_candidates"):
        BestOfN(0)
