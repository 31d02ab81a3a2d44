"""log Z and the effective sample size by hand: rows of a table, flat arrays, and what must not be trusted."""

import math

import pytest
import torch

from trl_bayes.groups import effective_sample_size, pooled_log_z
from trl_bayes.statistics.log_z import log_z_per_prompt, log_z_variance


def test_evidence_that_a_bound_shows_to_be_missing() -> None:
    """All weights are equal and the effective sample size is full, but a completion may exist that dwarfs them."""
    phi, index = torch.full((1000,), -20.0), torch.zeros(1000, dtype=torch.int64)
    estimate = log_z_per_prompt(phi, index, 1).average()
    assert not estimate.trusted and "have the same weight" in estimate.note
    assert log_z_per_prompt(phi.index_fill(0, torch.tensor([3]), -19.0), index, 1).trusted
    estimate = log_z_per_prompt(phi, index, 1, max_log_weight=0.0).average()
    assert not estimate.trusted and "too rare to have been seen" in estimate.note
    assert log_z_per_prompt(phi, index, 1, max_log_weight=-15.0).trusted  # 1000 e^-5 = 6.7 of the bound


def test_log_z_by_hand() -> None:
    phi = torch.tensor([0.0, -math.inf, 0.0, 0.0, math.log(2.0), 0.0, -math.inf])
    index = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    z = log_z_per_prompt(phi, index, 3)
    torch.testing.assert_close(z.log_z, torch.tensor([0.75, 1.5, 0.0], dtype=torch.float64).log())
    torch.testing.assert_close(z.effective_samples, torch.tensor([3, 9 / 5, 0.0], dtype=torch.float64))
    assert z.variance[0].item() == pytest.approx((1 / 3 - 1 / 4) * 4 / 3)
    assert z.variance[2].isnan()
    estimate = z.average()
    assert estimate.value == -math.inf and not estimate.trusted
    shifted = log_z_per_prompt(phi + 5000, index, 3)  # no overflow
    torch.testing.assert_close(shifted.log_z, z.log_z + 5000)


def test_rows_and_flat_arrays_agree() -> None:
    """Prompts with different numbers of samples, in any order; one of them has none."""
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.randn(4, 50, generator=generator, dtype=torch.float64) * 2
    valid = torch.rand(4, 50, generator=generator) < 0.7
    valid[2] = False
    index = torch.arange(4).unsqueeze(1).expand(4, 50)[valid]
    order = torch.randperm(len(index), generator=generator)
    z = log_z_per_prompt(log_weights[valid][order], index[order], 4)
    some = [0, 1, 3]
    torch.testing.assert_close(z.log_z[some], pooled_log_z(log_weights, valid)[some])
    torch.testing.assert_close(z.variance, log_z_variance(log_weights, valid), equal_nan=True)
    torch.testing.assert_close(z.effective_samples, effective_sample_size(log_weights, valid) * valid.sum(dim=1))
    assert z.log_z[2].isnan() and not z.trusted and math.isnan(z.average().value)


def test_the_variance_is_that_of_repetitions() -> None:
    generator = torch.Generator().manual_seed(1)
    log_weights = torch.randn(4000, 400, generator=generator, dtype=torch.float64) / 2
    valid = torch.ones_like(log_weights, dtype=torch.bool)
    spread = pooled_log_z(log_weights, valid).var().item()
    assert log_z_variance(log_weights, valid).mean().item() == pytest.approx(spread, rel=0.07)  # 3 standard errors


def test_bad_weights() -> None:
    index = torch.zeros(2, dtype=torch.int64)
    for phi in ([0.0, math.nan], [0.0, math.inf]):
        with pytest.raises(ValueError, match=r"below \+inf and not NaN"):
            log_z_per_prompt(torch.tensor(phi), index, 1)
    with pytest.raises(ValueError, match="above `max_log_potential=0`"):
        log_z_per_prompt(torch.tensor([0.0, 0.5]), index, 1, max_log_weight=0.0)
