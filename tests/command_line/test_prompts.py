"""Prompts written from other columns: templates, nested columns, first words, messages, streams, and refusals."""

from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from trl_bayes.command_line.prompts import with_prompts


ROWS = [
    {"question": "Why is  it so?", "answer": "#### 1", "prompt": {"text": "Once upon", "toxicity": 0.5}},
    {"question": "How", "answer": "#### 2", "prompt": {"text": "And then", "toxicity": None}},
]


def data() -> Dataset:
    return Dataset.from_list(ROWS)


def test_nothing_asked_for_is_nothing_done() -> None:
    rows = data()
    assert with_prompts(rows, None, None, False) is rows


@pytest.mark.parametrize(
    ("template", "words", "as_message", "expected"),
    [
        ("{question}", None, False, ["Why is  it so?", "How"]),
        ("{prompt[text]}", None, False, ["Once upon", "And then"]),
        ("Q: {question} {{}}", None, False, ["Q: Why is  it so? {}", "Q: How {}"]),
        ("{question}", 2, False, ["Why is", "How"]),
        ("{question}", None, True, [[{"role": "user", "content": q["question"]}] for q in ROWS]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_prompts(template: str, words: int | None, as_message: bool, expected: list[Any], stream: bool) -> None:
    rows = data().to_iterable_dataset() if stream else data()
    written = list(with_prompts(rows, template, words, as_message))
    assert [row["prompt"] for row in written] == expected
    assert [row["answer"] for row in written] == ["#### 1", "#### 2"]  # for the reward functions


def test_texts_that_are_prompts_already() -> None:
    rows = Dataset.from_dict({"prompt": ["one two three", "{brace}"]})
    assert with_prompts(rows, None, 2, False)["prompt"][:] == ["one two", "{brace}"]
    assert with_prompts(rows, None, None, True)["prompt"][1] == [{"role": "user", "content": "{brace}"}]


@pytest.mark.parametrize(
    ("template", "words", "message"),
    [
        ("{qestion}", None, r"names the column 'qestion', but the data has \['question', 'answer', 'prompt'\]"),
        ("{}", None, "names the column ''"),
        ("{0}", None, "names the column '0'"),
        ("{question", None, "not a format string"),
        ("{prompt[txt]}", None, "does not fit a row of the data .KeyError: 'txt'"),
        ("{question:d}", None, "does not fit a row"),
        ("{question}", 0, "`prompt_words=0` leaves nothing"),
        (None, 3, "for prompts that are texts, but the data has dicts"),
    ],
)
def test_refusals(template: str | None, words: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        list(with_prompts(data(), template, words, False))
    assert "\n" not in str(caught.value)


def test_a_stream_that_does_not_know_its_columns() -> None:
    rows = IterableDataset.from_generator(lambda: iter(ROWS))
    assert [row["prompt"] for row in with_prompts(rows, "{question}", 1, False)] == ["Why", "How"]
