"""Scored prior samples: the log Z that they give, and the table by prompt key."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_bayes.groups import differ
from trl_bayes.targets import ChiSquared, PriorScores, PromptTable, log_z_from_prior


INF, NAN = math.inf, math.nan


def test_log_z_by_hand() -> None:
    phi = torch.tensor([[0.0, math.log(3.0), NAN, NAN], [-INF, 0.0, -INF, -INF], [2.0] * 4])
    assert log_z_from_prior(phi).exp().tolist() == pytest.approx([2.0, 0.25, math.exp(2.0)])


def test_log_z_where_there_is_nothing() -> None:
    phi = torch.tensor([[-INF, -INF], [NAN, NAN], [1.0, NAN]])
    assert log_z_from_prior(phi).tolist() == pytest.approx([-INF, NAN, 1.0], nan_ok=True)


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_log_z_does_not_overflow(size: float) -> None:
    log_z = log_z_from_prior(torch.tensor([[size, size + 1]]))
    assert log_z.item() == pytest.approx(size + math.log((1 + math.e) / 2), abs=1e-3)


def test_chi_squared_has_no_z_to_estimate(enumerated: Any) -> None:
    """On the samples that tau was fitted to, Z is 1 exactly."""
    prior = enumerated.sample(enumerated.feature("a").unsqueeze(1), 500, seed=0)
    target = ChiSquared(0.2)
    target.fit(prior)
    phi = prior.log_potential(target)
    assert log_z_from_prior(phi).tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    assert differ(phi).all()


def test_infinite_rewards_are_missing() -> None:
    prior = PriorScores(torch.tensor([[[INF], [1.0], [-INF]]]), torch.zeros(1, 3), torch.tensor([0]))
    assert prior.rewards.flatten().tolist() == pytest.approx([NAN, 1.0, NAN], nan_ok=True)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (2, 3), (2,)), r"takes rewards \(P, N, K\), log_prior \(P, N\) and keys \(P,\), got \(2, 3\), "),
        (((2, 3, 1), (2, 2), (2,)), "takes rewards"),
        (((2, 3, 1), (2, 3), (3,)), "takes rewards"),
        (((2, 1, 1), (2, 1), (2,)), "takes at least 1 prompt and 2 samples of each, got 2 and 1: draw more"),
        (((0, 5, 1), (0, 5), (0,)), "takes at least 1 prompt and 2 samples of each, got 0 and 5"),
    ],
)
def test_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    rewards, log_prior, keys = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        PriorScores(rewards, log_prior, keys.long())


def test_a_prompt_twice() -> None:
    with pytest.raises(ValueError, match=r"must have different keys: give each prompt once\.$"):
        PriorScores(torch.zeros(2, 3, 1), torch.zeros(2, 3), torch.tensor([4, 4]))


def test_table_finds_prompts_in_any_order(tmp_path: Path) -> None:
    keys = torch.tensor([2**59 + 1, -3, 2**59, 8])
    table = PromptTable.of(keys, torch.arange(8.0).view(4, 2))
    torch.save(table.state_dict(), tmp_path / "table.pt")
    restored = PromptTable(**torch.load(tmp_path / "table.pt", weights_only=True))
    for each in (table, restored):
        assert each.lookup(torch.tensor([8, 2**59, 8, 2**59 + 1])).tolist() == [[6, 7], [4, 5], [6, 7], [0, 1]]
        assert each.lookup(torch.tensor([], dtype=torch.int64)).shape == (0, 2)
        for unknown in (-4, 0, 2**59 + 2):
            with pytest.raises(ValueError, match="^1 of 2 prompts have no prior samples: draw them for every prompt"):
                each.lookup(torch.tensor([8, unknown, unknown]))


def test_multiplicity() -> None:
    """Once each if nothing is said; on the CPU, whatever numbers they are."""
    rewards, log_prior, keys = torch.zeros(3, 2, 1), torch.zeros(3, 2), torch.arange(3)
    assert PriorScores(rewards, log_prior, keys).multiplicity.tolist() == [1.0, 1.0, 1.0]
    given = PriorScores(rewards, log_prior, keys, multiplicity=torch.tensor([2, 0, 1]))
    assert given.multiplicity.tolist() == [2.0, 0.0, 1.0]
    assert given.under(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)).multiplicity.tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("multiplicity", [[1, 1], [1.0, -1.0, 1.0], [0, 0, 0], [1.0, NAN, 1.0], [1.0, INF, 1.0]])
def test_multiplicity_refused(multiplicity: list[float]) -> None:
    with pytest.raises(
        ValueError, match="`multiplicity` says how often each prompt occurs in the training data: give"
    ):
        PriorScores(torch.zeros(3, 2, 1), torch.zeros(3, 2), torch.arange(3), multiplicity=torch.tensor(multiplicity))
