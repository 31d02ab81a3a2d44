"""Rewards from configuration: a name, a name with arguments, a dotted path, or a reward model."""

import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from ..spelling import did_you_mean
from .specification import import_object, with_numbers


RewardSpec = str | Mapping[str, Any] | Callable[..., Any]

_BUILDERS = ("build_reward", "build_rewards")  # public names of this package that are no evidence
_GIVEN_BY_TRL = ("prompts", "completions", "completion_ids")


def build_rewards(specs: RewardSpec | Iterable[RewardSpec] | None) -> list[Any]:
    """
    Makes reward functions from what a user writes, in the same order.

    Args:
        specs (`list`, *optional*): as for [`build_reward`]; one alone need not be in a list.

    Returns:
        `list`: callables, and ids or folders of reward models.

    Raises:
        ValueError: as for [`build_reward`].
    """
    if specs is None:
        return []
    if isinstance(specs, str | Mapping) or callable(specs):
        specs = [specs]
    return [build_reward(spec) for spec in specs]


def build_reward(spec: RewardSpec) -> Any:
    """
    Makes one reward function, in TRL's format, from what a user writes.

    Args:
        spec (`str`, `Mapping` or `Callable`):
            The name of a reward of [`trl_bayes.rewards`] or of `trl.rewards` (`"parses"`, `"accuracy_reward"`); the
            dotted path of a function, importable from the working folder too (`"my_rewards.short"`); the id or folder
            of a reward model, which is any text with a slash and any folder that exists. A mapping
            `{"name": "max_length", "characters": 40}` gives what `name` stands for the other entries: a factory is
            called with them, and of a reward function they set parameters. A callable is returned as it is.

    Returns:
        `Callable` or `str`: a reward function, or a reward model's id or folder, which the trainer loads.

    Raises:
        ValueError: what is named does not exist, cannot be imported, is not callable, or is not given the arguments
            that it needs; one sentence.
    """
    if callable(spec):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str) or not spec["name"]:
        raise ValueError(f"A reward is a name, or a mapping with `name` and arguments, but got {spec!r}.")
    name, arguments = spec["name"], {key: value for key, value in spec.items() if key != "name"}
    if _is_model(name):
        if arguments:
            raise ValueError(f"{name!r} is a reward model, which takes no arguments: leave out {sorted(arguments)}.")
        return name
    found = _find(name)
    if _is_reward_function(found):
        return _with_arguments(name, found, arguments) if arguments else found
    return _call_factory(name, found, arguments)


def ready_rewards() -> dict[str, str]:
    """Names of the rewards that need no path, with the module of each; ours come before TRL's."""
    ours, theirs = importlib.import_module("trl_bayes.rewards"), importlib.import_module("trl.rewards")
    names = {name: theirs.__name__ for name in theirs.__all__ if not name.endswith("_rewards")}  # those are modules
    return names | {name: ours.__name__ for name in ours.__all__ if name not in _BUILDERS}


def _is_model(name: str) -> bool:
    return "/" in name or os.path.isdir(name)


def _find(name: str) -> Any:
    ready = ready_rewards()
    if name in ready:
        return getattr(importlib.import_module(ready[name]), name)
    if "." not in name:
        raise ValueError(
            f"There is no reward {name!r}{did_you_mean(name, ready)}: use one of {sorted(ready)}, the dotted path "
            "of a function, or the id or folder of a reward model."
        )
    return _import(name)


def _import(path: str) -> Any:
    found = import_object(path, "reward")
    if not callable(found):
        raise ValueError(f"The reward {path!r} is a {type(found).__name__}: it must be a function.")
    return found


def _is_reward_function(function: Callable[..., Any]) -> bool:
    """Whether TRL can call it as it is: it takes what TRL gives. Anything else makes a reward function."""
    if inspect.isclass(function):
        return False
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C: it does not say
        return True
    return any(p.name in _GIVEN_BY_TRL or p.kind is p.VAR_KEYWORD for p in parameters)


def _with_arguments(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """A reward function some of whose own parameters are set."""
    own = [each for each in inspect.signature(function).parameters.values() if each.name not in _GIVEN_BY_TRL]
    own_names = [each.name for each in own if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    if unknown := sorted(set(arguments) - set(own_names)):
        raise ValueError(
            f"The reward function {name!r} has no parameter {unknown[0]!r} that could be set: leave it out, or set "
            f"those that it has ({own_names})."
        )
    return partial(function, **with_numbers(function, arguments, f"the reward {name!r}"))


def _call_factory(name: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        takes = list(inspect.signature(factory).parameters)
        raise ValueError(
            f"{name!r} takes {takes}, so it makes a reward from arguments ({error}): give them as {{name: {name}, "
            f"{', '.join(f'{parameter}: ...' for parameter in takes)}}}; a reward function itself takes `completions`."
        ) from None
    arguments = with_numbers(factory, arguments, f"the reward {name!r}")
    try:
        reward = factory(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The reward {name!r} cannot be made from {dict(arguments)} ({error}).") from error
    if not callable(reward):
        raise ValueError(
            f"{name!r} takes none of {list(_GIVEN_BY_TRL)} and returns a {type(reward).__name__}, so it is neither a "
            "reward function nor a factory of them."
        )
    return reward
