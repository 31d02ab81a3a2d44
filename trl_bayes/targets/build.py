"""Targets from configuration: a name, a mapping, a dotted path, or an object."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from ..rewards.specification import import_object, with_numbers
from ..spelling import did_you_mean
from .base import Target


TargetSpec = str | Mapping[str, Any] | Target


def build_target(spec: TargetSpec | None, beta: float | None = None) -> Target:
    """
    Makes a target from what a user writes.

    Args:
        spec (`str`, `Mapping` or [`Target`], *optional*):
            A name (`"constraint"`), a mapping with `name` and the target's arguments (`{"name": "tilt", "beta": 0.1}`;
            the factors of a `product` are such specifications, and the arguments of a `calibrated` target's transform
            stand beside its name: `{"name": "calibrated", "transform": "best_of_n", "n": 4}`), a dotted path to a
            [`Target`] class (`"my_package.targets.Mine"`), or a [`Target`]. `None` is `tilt`, over the weighted reward
            sum.
        beta (`float`, *optional*):
            The run's temperature, for a target that takes one and is not given its own. `None`, as in pure RL, leaves
            it at the target's default.

    Returns:
        [`Target`]

    Raises:
        ValueError: unknown name, or arguments that the target does not take.
    """
    if isinstance(spec, Target):
        return spec
    if spec is None:
        spec = "tilt"
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ValueError(f"`target` must be a name, a mapping with `name`, a dotted path or a `Target`, got {spec!r}.")
    target_class = _find(spec["name"])
    given = {key: value for key, value in spec.items() if key != "name"}
    arguments = target_class.arguments_from_config(given, beta)
    try:
        inspect.signature(target_class).bind(**arguments)
    except TypeError as error:
        takes = list(inspect.signature(target_class).parameters)
        raise ValueError(f"The target {spec['name']!r} takes {takes}: {error}.") from None
    arguments = with_numbers(target_class, arguments, f"the target {spec['name']!r}")
    try:
        return target_class(**arguments)
    except TypeError as error:
        raise ValueError(f"The target {spec['name']!r} cannot be made from {arguments} ({error}).") from error


def target_names() -> dict[str, type[Target]]:
    """The targets of this package by the names that recipes use: `chi_squared` for `ChiSquared`."""
    package = importlib.import_module(__package__)
    found: dict[str, type[Target]] = {}
    for each in pkgutil.iter_modules(package.__path__):
        for value in vars(importlib.import_module(f"{__package__}.{each.name}")).values():
            if _is_target(value):
                found[re.sub(r"(?<!^)(?=[A-Z])", "_", value.__name__).lower()] = value
    return dict(sorted(found.items()))


def _is_target(value: Any) -> TypeGuard[type[Target]]:
    return inspect.isclass(value) and issubclass(value, Target) and not inspect.isabstract(value)


def _find(name: str) -> type[Target]:
    if "." not in name:
        known = target_names()
        if name in known:
            return known[name]
        raise ValueError(
            f"Unknown target {name!r}{did_you_mean(name, known)}: use one of {list(known)} or the dotted path of a "
            "Target class."
        )
    found = import_object(name, "target")
    if not _is_target(found):
        raise ValueError(f"The target {name!r} is not a concrete subclass of `trl_bayes.targets.Target`.")
    return found
