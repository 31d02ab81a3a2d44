"""Evidence about structure: is the completion one JSON document, with the keys and types that a schema asks for?"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from .texts import RewardFunction, completion_text, named


def valid_json(schema: Mapping[str, Any] | None = None, called: str = "valid_json") -> RewardFunction:
    """
    Makes the reward 1[the completion is JSON, and valid against the schema].

    The whole completion must be one JSON document: text around it, a Markdown fence, `NaN` and `Infinity` do not
    count. White space around it does not matter. Schemas are those of [JSON Schema](https://json-schema.org), checked
    by the package jsonschema.

    Args:
        schema (`dict`, *optional*): of all prompts. Defaults to the data's column `schema`, which has one for each
            prompt, as a text or an object; without either any JSON document counts.
        called (`str`, *optional*, defaults to `"valid_json"`): name in logs and targets.

    Returns:
        `Callable`: a reward function, 1.0 or 0.0 for every completion.

    Raises:
        ImportError: a schema is given, and jsonschema is not installed.
        ValueError: the schema is none; at the first call, if it is in the data.
    """
    common = None if schema is None else json.dumps(schema, sort_keys=True)
    if common is not None:
        _validator(common)  # refused now rather than in the first batch

    def reward(completions: list[Any], schema: Sequence[Any] | None = None, **kwargs: Any) -> list[float | None]:
        schemas = [common] * len(completions) if common is not None or schema is None else map(_as_text, schema)
        return [
            float(_holds(completion_text(completion), asked))
            for completion, asked in zip(completions, schemas, strict=True)
        ]

    return named(reward, called)


def _as_text(schema: Any) -> str | None:
    return schema if schema is None or isinstance(schema, str) else json.dumps(_without_none(schema), sort_keys=True)


def _without_none(schema: Any) -> Any:
    """Without the keys that `datasets` adds where other rows have them; a text can ask for `const: null`."""
    if isinstance(schema, Mapping):
        return {key: _without_none(value) for key, value in schema.items() if value is not None}
    return [_without_none(each) for each in schema] if isinstance(schema, list) else schema


def _holds(text: str, schema: str | None) -> bool:
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # what nests deeper than Python's stack is no answer either
        return False
    return schema is None or _is_valid(document, schema)


def _is_valid(document: Any, schema: str) -> bool:
    validator = _validator(schema)
    from referencing.exceptions import Unresolvable  # comes with jsonschema

    try:
        return bool(validator.is_valid(document))
    except (RecursionError, ArithmeticError):  # no number is infinite, and none is a multiple that overflows
        return False
    except Unresolvable as error:
        raise ValueError(f"`valid_json`: {schema[:80]!r} refers to what is not in it ({error}).") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:
    try:
        from jsonschema import Draft202012Validator, SchemaError
    except ImportError:
        raise ImportError(
            "`valid_json` with a schema needs the package jsonschema: pip install 'trl_bayes[rewards]'."
        ) from None
    try:
        parsed = json.loads(schema)
        Draft202012Validator.check_schema(parsed)
    except (ValueError, SchemaError) as error:
        raise ValueError(f"`valid_json`: {schema[:80]!r} is no JSON schema ({str(error).splitlines()[0]}).") from None
    return Draft202012Validator(parsed)
