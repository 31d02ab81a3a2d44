"""The container: every number stays with its completion, whatever is selected, sorted or put together."""

import pytest
import torch
from torch import Tensor

from trl_bayes.language_models.completions import Completions


INDEX = torch.tensor([1, 0, 1, 1, 0, 2])


def make(index: Tensor = INDEX, offset: int = 0) -> Completions:
    """Completion i has the tokens [i, ...], the text "i" and numbers that say i."""
    numbers = [offset + i for i in range(len(index))]
    return Completions(
        prompts=["x", "y", "z"],
        prompt_ids=[[7], [8], [9]],
        prompt_index=index,
        completion_ids=[[i] * (1 + i % 3) for i in numbers],
        texts=[str(i) for i in numbers],
        ended=torch.tensor([i % 2 == 0 for i in numbers], dtype=torch.bool),
    ).with_known(phi=torch.tensor(numbers, dtype=torch.float64), rewards=torch.tensor(numbers).double().unsqueeze(1))


def numbers_of(completions: Completions) -> list[int]:
    """Which completions these are, once it is clear that all that is known of each agrees."""
    numbers = [int(text) for text in completions.texts]
    assert [ids[0] for ids in completions.completion_ids] == numbers
    assert completions.phi.tolist() == completions.rewards[:, 0].tolist() == numbers
    assert completions.ended.tolist() == [i % 2 == 0 for i in numbers]
    assert completions.lengths.tolist() == [1 + i % 3 for i in numbers]
    return numbers


def test_selecting_keeps_what_belongs_together() -> None:
    completions = make()
    assert numbers_of(completions) == [0, 1, 2, 3, 4, 5]
    assert numbers_of(completions.select(torch.tensor([4, 0]))) == [4, 0]
    assert numbers_of(completions.select(torch.zeros(0, dtype=torch.int64))) == []
    ordered = completions.sorted_by_prompt()
    assert numbers_of(ordered) == [1, 4, 0, 2, 3, 5] and ordered.prompt_index.tolist() == [0, 0, 1, 1, 1, 2]
    assert completions.number_per_prompt().tolist() == [2, 3, 1]


def test_the_first_of_each_prompt() -> None:
    completions = make()
    assert numbers_of(completions.first_of_each_prompt(torch.tensor([1, 2, 0]))) == [0, 1, 2]
    assert numbers_of(completions.first_of_each_prompt(torch.tensor([9, 9, 9]))) == [0, 1, 2, 3, 4, 5]


def test_putting_together() -> None:
    one, other = make(), make(INDEX.flip(0), offset=10)
    both = Completions.concatenate([one, other])
    assert numbers_of(both) == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    assert both.prompt_index.tolist() == [*INDEX.tolist(), *INDEX.flip(0).tolist()]
    keep = torch.tensor([True, False, True, False, False, True])
    chosen = one.where(keep, other)
    assert numbers_of(chosen) == [0, 11, 2, 13, 14, 5] and chosen.prompt_index.tolist() == [1, 0, 1, 1, 0, 2]
    weighted = one.with_known(log_weights=torch.zeros(6))
    assert "log_weights" not in Completions.concatenate([weighted, other]).known  # not known of all


def test_a_number_that_is_not_known() -> None:
    completions = make()
    for name in ("log_policy", "log_prior", "log_weights"):
        with pytest.raises(ValueError, match=rf"The `{name}` of these completions is not known"):
            getattr(completions, name)
    with pytest.raises(ValueError, match="6 completions cannot have 5 numbers called 'phi'"):
        completions.with_known(phi=torch.zeros(5))
    with pytest.raises(ValueError, match="6 completions cannot have 6 numbers called 'log_prob'"):
        completions.with_known(log_prob=torch.zeros(6))
    assert numbers_of(completions.with_known(log_prior=torch.ones(6))) == [0, 1, 2, 3, 4, 5]


def test_a_data_set_of_what_is_known() -> None:
    completions = make()
    table = completions.to_dataset()
    assert table.column_names == ["prompt", "completion", "rewards", "log_potential", "ended"]
    assert table[5] == {"prompt": "z", "completion": "5", "rewards": [5.0], "log_potential": 5.0, "ended": False}
    tokens = completions.with_known(log_weights=torch.arange(6.0)).to_dataset(tokens=True)
    assert tokens[1]["log_weight"] == 1 and tokens[1]["input_ids"] == [7, 1, 1]
    assert tokens[1]["completion_mask"] == [0, 1, 1]
