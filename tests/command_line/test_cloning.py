"""What is cloned and what is preferred, in tokens: as drawn, and as they will be read."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template

from trl_bayes.command_line.cloning import refuse_cut, with_floor
from trl_bayes.command_line.demonstration_data import distinct_prompts, split_held_out, tokenized
from trl_bayes.command_line.preference_stage import pairs
from trl_bayes.command_line.stages import StageError
from trl_bayes.language_models.completions import Completions


def test_the_floor_is_cloned_in_the_tokens_that_were_drawn(tmp_path: Path) -> None:
    """One that was cut gets no EOS behind it, as it would from its text."""
    drawn = {"prompt": "a", "completion": "b c", "input_ids": [1, 2, 3, 4], "completion_mask": [0, 0, 1, 1]}
    (tmp_path / "floor.jsonl").write_text(json.dumps(drawn) + "\n")
    prepared = Dataset.from_dict({"input_ids": [[1, 5]], "labels": [[-100, 5]], "text": ["x"]})
    rows = with_floor(prepared, tmp_path / "floor.jsonl")
    assert rows["input_ids"][:] == [[1, 5], [1, 2, 3, 4]] and rows["labels"][:] == [[-100, 5], [-100, -100, 3, 4]]


def test_preferences_are_read_as_the_policy_will_be(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    def plain(text: str) -> list[int]:
        return chat_tokenizer(text=text, add_special_tokens=False)["input_ids"]

    rows = Dataset.from_list([{"prompt": "say", "chosen": " yes", "rejected": " no"}])
    assert tokenized(rows, chat_tokenizer, None).to_list() == [
        {"chosen_ids": plain("say yes"), "rejected_ids": plain("say no")}
    ]
    said = [{"role": "assistant", "content": "yes"}]
    question = [{"role": "user", "content": "say"}]
    rows = Dataset.from_list([{"prompt": question, "chosen": said, "rejected": said}])
    text = apply_chat_template({"messages": question + said}, chat_tokenizer)["text"]
    assert tokenized(rows, chat_tokenizer, None)["chosen_ids"][0] == plain(text)


def test_pairs_put_the_better_one_first_and_leave_ties_out() -> None:
    drawn = Completions(
        prompts=["p", "q", "r"],
        prompt_ids=[[1], [2], [3]],
        prompt_index=torch.tensor([0, 0, 1, 1, 2, 2]),
        completion_ids=[[9]] * 6,
        texts=list("abcdef"),
        ended=torch.ones(6, dtype=torch.bool),
    )
    found = pairs(drawn, torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 2.0]]))
    assert found == [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "r", "chosen": "f", "rejected": "e"},
    ]


@pytest.mark.parametrize(("held_out", "number"), [(0, 0), (0.25, 2), (3, 3), (0.5, 4)])
def test_held_out(held_out: float, number: int) -> None:
    rows = Dataset.from_dict({"prompt": list("aabbccdd"), "completion": list("12345678")})
    cloned, measuring = split_held_out(rows, held_out, seed=0)
    assert len(measuring) == number
    assert sorted([*cloned["completion"], *measuring["completion"]]) == list("12345678")
    assert distinct_prompts(rows) == list("abcd")


def test_what_cannot_be_compared_makes_no_pair() -> None:
    drawn = Completions(["p"], [[1]], torch.tensor([0, 0]), [[2], [3]], ["a", "b"], torch.tensor([True, True]))
    assert pairs(drawn, torch.tensor([[float("nan"), -1.0]])) == []


@pytest.mark.parametrize("lengths", [[3, 8], [3]])  # one is cut to the limit, one is gone
def test_demonstrations_that_are_cut_are_refused(lengths: list[int]) -> None:
    given = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    made = Dataset.from_list([{"input_ids": [1] * length} for length in lengths])
    trainer: Any = SimpleNamespace(train_dataset=made, eval_dataset=None)
    refuse_cut(trainer, (given, given), None)
    with pytest.raises(StageError, match="`max_length=8` in the section `clone` cuts"):
        refuse_cut(trainer, (given, given), 8)
