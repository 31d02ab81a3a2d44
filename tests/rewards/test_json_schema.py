"""Evidence about structure: one JSON document, valid against a schema."""

import json
import sys
from typing import Any

import pytest

from trl_bayes.rewards import build_reward, valid_json


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        (' \n{"name": "Ada"}\n', 1.0),
        ('{"name": "Ada", "born": 1815}', 1.0),  # more keys than were asked for
        ('{"age": 36}', 0.0),
        ('{"name": "Ada", "age": "36"}', 0.0),
        ('{"name": "Ada", "age": true}', 0.0),  # an integer for Python, not for JSON
        ('{"name": "Ada", "age": 36.5}', 0.0),
        ('[{"name": "Ada"}]', 0.0),
        ('{"name": "Ada"} {"name": "Bob"}', 0.0),
        ('Sure: {"name": "Ada"}', 0.0),
        ('```json\n{"name": "Ada"}\n```', 0.0),
        ('{"name": "Ada", "age": NaN}', 0.0),
        ("{'name': 'Ada'}", 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_one_schema_for_all(text: str, expected: float) -> None:
    reward = valid_json(PERSON)
    assert reward(completions=[text, says(text)]) == [expected, expected]


def test_the_schema_of_each_row() -> None:
    cities = {"type": "object", "required": ["country"]}
    rows = [json.dumps(PERSON), cities, None]  # a text, an object, none
    reward = build_reward("valid_json")
    assert reward(completions=['{"name": "Ada"}'] * 3, schema=rows) == [1.0, 0.0, 1.0]
    assert reward.__name__ == "valid_json"


def test_without_a_schema_any_json_counts() -> None:
    assert valid_json()(completions=["[1, 2]", "3", "three"]) == [1.0, 1.0, 0.0]


def test_keys_that_other_rows_brought_ask_for_nothing() -> None:
    rows = [{"type": "object", "const": None, "minimum": None}, {"type": None, "const": 2, "minimum": 2}]
    assert valid_json()(completions=['{"x": 1}', "2"], schema=rows) == [1.0, 1.0]


def test_schemas_that_refer_to_themselves_or_to_nothing() -> None:
    nested = valid_json({"items": {"$ref": "#"}})
    assert nested(completions=["[" * 300 + "]" * 300, "[[]]"])[1] == 1.0  # the first is an answer or not, no crash
    with pytest.raises(ValueError, match="refers to what is not in it"):
        valid_json({"$ref": "#/definitions/a"})(completions=["{}"])


@pytest.mark.parametrize("number", ["1e999", "9" * 400])
def test_a_number_that_overflows_is_no_answer(number: str) -> None:
    assert valid_json({"type": "number", "multipleOf": 0.01})(completions=[number, "1.25"]) == [0.0, 1.0]


def test_what_is_no_schema_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="is no JSON schema"):
        valid_json({"type": "person"})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown: dict[str, Any] = {"type": "object", "title": "not cached"}
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ImportError, match=r"trl_bayes\[rewards\]"):
        valid_json(unknown)
