"""What rewards and targets that are written in a configuration share: objects by their path, numbers as texts."""

import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints


def import_object(path: str, what: str) -> Any:
    """
    The object at a dotted path; modules in the working folder count, as they do for `python -m`.

    Args:
        path (`str`): such as `"my_rewards.short"`.
        what (`str`): what it is, for the message, such as `"reward"`.

    Raises:
        ValueError: it cannot be imported, whatever the user's module raises; one sentence.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        raise ValueError(f"The {what} {path!r} cannot be imported ({type(error).__name__}: {reason}).") from error


def with_numbers(function: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> dict[str, Any]:
    """
    Arguments from a configuration, with texts such as `1e-1`, which YAML 1.1 does not take for numbers, as numbers.

    Which arguments are numbers the annotations of the function say; one that may be a text stays as it is.

    Args:
        function (`Callable`): what will be called, or a class.
        arguments (`Mapping`): by name.
        what (`str`): of what they are, for the message, such as `"the target 'tilt'"`.

    Raises:
        ValueError: a text that is not a number, a list or a mapping, where a number is wanted; one sentence.
    """
    hints = _hints(function)
    return {name: _number(value, hints.get(name, Any), f"`{name}` of {what}") for name, value in arguments.items()}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except (NameError, TypeError, AttributeError):  # annotations that say nothing here
        return {}


def _number(value: Any, hint: Any, where: str) -> Any:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if not set(members) <= {int, float, types.NoneType}:
        of_entries = [get_args(member)[1] for member in members if len(get_args(member)) == 2]  # of mappings
        if isinstance(value, Mapping) and set(of_entries) & {int, float}:
            return {key: _number(entry, of_entries[0], f"`{key}` in {where}") for key, entry in value.items()}
        return value
    if not isinstance(value, str | list | Mapping):
        return value  # what else it may be, the function checks
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be a number, but is {value!r}.") from None
    return int(number) if float not in members and number.is_integer() else number
