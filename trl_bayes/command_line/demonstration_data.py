"""What is cloned and what is preferred: rows that both stages can read whole, checked before a model is loaded."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DatasetMixtureConfig, ScriptArguments, apply_chat_template

from ..language_models.generation import tokenize_prompt
from ..language_models.prompts import check_prompt
from ..spelling import did_you_mean
from .data import load_data
from .demonstration_recipe import CloneArguments, PreferenceArguments


_READ_BY_NOBODY = ("tools", "image", "images", "chat_template_kwargs")
"""Columns that change how `SFTTrainer` and `RewardTrainer` read a row, and that the last stage does not have."""


def load_rows(args: Any) -> Dataset:
    """
    One split of the data that a section names.

    Raises:
        ValueError: it cannot be loaded, or has no such split, no rows, or a column that no stage reads; one sentence.
    """
    named = ScriptArguments(dataset_name=args.dataset_name, dataset_config=args.dataset_config)
    found = load_data(named, DatasetMixtureConfig())
    name, split = args.dataset_name, args.dataset_train_split
    if split not in found:
        raise ValueError(f"{name!r} has no split {split!r}{did_you_mean(split, found)}: it has {list(found)}.")
    rows = cast(Dataset, found[split])
    if len(rows) == 0:
        raise ValueError(f"The data {name!r} have no rows.")
    if strange := [column for column in _READ_BY_NOBODY if column in rows.column_names]:
        raise ValueError(
            f"The data {name!r} have a column {strange[0]!r}, with which the stages would read prompts differently: "
            "leave it out, or train each stage by a script of your own."
        )
    return rows


def _is_answer(completion: Any) -> bool:
    """Whether it is the one message that a policy answers with."""
    if not isinstance(completion, list) or len(completion) != 1 or not isinstance(completion[0], Mapping):
        return False
    return completion[0].get("role") == "assistant" and isinstance(completion[0].get("content"), str)


# ---------------------------------------------------------------------------------------------------------------------
# Demonstrations


def load_demonstrations(args: CloneArguments) -> Dataset:
    """
    The demonstrations, checked row by row.

    Raises:
        ValueError: none are named, or they cannot be loaded, or have no column `completion`, or no rows; one sentence.
    """
    if args.dataset_name is None:
        raise ValueError(
            "`dataset_name` is missing in the section `clone`: name demonstrations, by id, file or folder."
        )
    rows = load_rows(args)
    if "completion" not in rows.column_names:
        hint = ""
        if "messages" in rows.column_names:
            hint = ", so split each conversation into `completion`, its last message, and `prompt`, those before"
        raise ValueError(
            f"The demonstrations {args.dataset_name!r} have no column 'completion': they have "
            f"{rows.column_names}{hint}."
        )
    if "prompt" not in rows.column_names:
        rows = rows.add_column("prompt", [""] * len(rows))
    rows = rows.select_columns(["prompt", "completion"])
    for row in rows:
        check_prompt(row["prompt"])
        _check_completion(
            row["prompt"], row["completion"], f"A completion of the demonstrations {args.dataset_name!r}"
        )
    return rows


def _check_completion(prompt: Any, completion: Any, which: str) -> None:
    if type(completion) is not type(prompt):
        raise ValueError(
            f"{which} is {completion!r}, with the prompt {prompt!r}: make both texts, or both lists of messages."
        )
    if not isinstance(completion, str) and not _is_answer(completion):
        raise ValueError(
            f"{which} is {completion!r}: make it one message with the role 'assistant' and a text, which is what a "
            "policy answers with."
        )


def split_held_out(rows: Dataset, held_out: float, seed: int) -> tuple[Dataset, Dataset]:
    """
    What is cloned, and what measures the clone.

    Raises:
        ValueError: nothing would be left to clone; one sentence.
    """
    number = round(held_out * len(rows)) if held_out < 1 else math.floor(held_out)
    if number >= len(rows):
        raise ValueError(f"`held_out={held_out:g}` of {len(rows)} demonstrations leaves none to clone: set less.")
    mixed = rows.shuffle(seed=seed)
    return mixed.select(range(number, len(rows))), mixed.select(range(number))


def distinct_prompts(rows: Dataset) -> list[Any]:
    """Each prompt once, in the order in which they come."""
    return list({json.dumps(prompt, sort_keys=True): prompt for prompt in rows["prompt"]}.values())


def check_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
    """
    What the demonstrations are in tokens: none without a prompt to begin from, none that `SFTTrainer` would cut.

    Raises:
        ValueError: one sentence.
    """
    for prompt in distinct_prompts(rows):
        if not isinstance(prompt, str) and tokenizer.chat_template is None:
            raise ValueError(
                "The prompts are messages, and the tokenizer has no chat template to write them by: use a chat model, "
                "or make prompts and completions texts."
            )
        tokenize_prompt(tokenizer, prompt)  # which refuses one without any
    if max_length is not None and max(_length(row, tokenizer) for row in rows) >= max_length:
        raise ValueError(cut(max_length))


def cut(max_length: int) -> str:
    """The sentence that refuses demonstrations of which `SFTTrainer` would keep the beginning only."""
    return (
        f"`max_length={max_length}` in the section `clone` cuts some demonstrations: set it to null, or to more "
        "tokens than the longest prompt and completion have."
    )


def _length(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of prompt, completion and, of texts, the EOS that `SFTTrainer` adds."""
    if isinstance(row["prompt"], str):
        return len(cast(Any, tokenizer(text=row["prompt"] + row["completion"]))["input_ids"]) + 1
    encoded: Any = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=True)
    return len(encoded["input_ids"])


# ---------------------------------------------------------------------------------------------------------------------
# Preferences


def load_preferences(args: PreferenceArguments) -> Dataset:
    """
    The preferences that are there already, checked row by row.

    Raises:
        ValueError: they have no column `chosen` or `rejected`, or something else in it; one sentence.
    """
    rows = load_rows(args)
    if missing := [name for name in ("chosen", "rejected") if name not in rows.column_names]:
        raise ValueError(
            f"The preferences {args.dataset_name!r} have no column {missing[0]!r}: they have {rows.column_names}."
        )
    for row in rows:
        prompt = row.get("prompt")
        if prompt is not None:
            check_prompt(prompt)
        for name in ("chosen", "rejected"):
            which = f"An entry of the column {name!r} of the preferences {args.dataset_name!r}"
            if prompt is not None:
                _check_completion(prompt, row[name], which)
                continue
            try:
                check_prompt(row[name])  # a text, or a whole conversation
            except ValueError:
                raise ValueError(f"{which} is {row[name]!r}: make it a text, or a list of messages.") from None
    return rows


def tokenized(preferences: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """
    Preferences in the tokens that `GRPOTrainer` will make of the policy's completions when it asks the reward model.

    `RewardTrainer` itself would end each text by EOS, and begin it by what the tokenizer puts in front, neither of
    which is there later. And it would leave out, without a word, what is longer than `max_length`.

    Raises:
        ValueError: some are longer, or are without tokens; one sentence.
    """

    def ids(prompt: Any, completion: Any) -> list[int]:
        if isinstance(completion, str):
            text = (prompt or "") + completion
        else:
            text = apply_chat_template({"messages": [*(prompt or []), *completion]}, tokenizer)["text"]
        return list(cast(Any, tokenizer(text=text, add_special_tokens=False))["input_ids"])

    rows = [{name: ids(row.get("prompt"), row[name]) for name in ("chosen", "rejected")} for row in preferences]
    _refuse_lengths([(len(row["chosen"]), len(row["rejected"])) for row in rows], max_length)
    return Dataset.from_list([{"chosen_ids": row["chosen"], "rejected_ids": row["rejected"]} for row in rows])


def _refuse_lengths(lengths: Sequence[tuple[int, int]], max_length: int | None) -> None:
    if empty := sum(min(pair) == 0 for pair in lengths):
        raise ValueError(
            f"{empty} of {len(lengths)} preferences have a text without tokens, which a reward model cannot read: "
            "leave them out, or give them a prompt."
        )
    longest = max(max(pair) for pair in lengths)
    if max_length is not None and longest > max_length:
        number = sum(max(pair) > max_length for pair in lengths)
        raise ValueError(
            f"`max_length={max_length}` in the section `reward` leaves out {number} of {len(lengths)} preferences, of "
            f"which the longest has {longest} tokens: set it to null, or to {longest} or more."
        )
