"""Targets from configuration: a name, a mapping, a dotted path, or an object."""

import importlib
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from .base import Target
from .constraint import Constraint
from .product import Product
from .tilt import Tilt


_BY_NAME: dict[str, type[Target]] = {"tilt": Tilt, "constraint": Constraint, "product": Product}

TargetSpec = str | Mapping[str, Any] | Target


def build_target(spec: TargetSpec | None, beta: float) -> Target:
    """
    Makes a target from what a user writes.

    Args:
        spec (`str`, `Mapping` or [`Target`], *optional*):
            A name (`"constraint"`), a mapping with `name` and the target's arguments (`{"name": "tilt", "beta": 0.1}`;
            the factors of a `product` are such specifications), a dotted path to a [`Target`] class
            (`"my_package.targets.Mine"`), or a [`Target`]. `None` is `Tilt(beta)` over the weighted reward sum.
        beta (`float`):
            Temperature of a `tilt` that does not give its own.

    Returns:
        [`Target`]

    Raises:
        ValueError: unknown name, or arguments that the target does not take.
    """
    if spec is None:
        return Tilt(beta)
    if isinstance(spec, Target):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ValueError(f"`target` must be a name, a mapping with `name`, a dotted path or a `Target`, got {spec!r}.")
    arguments = {key: value for key, value in spec.items() if key != "name"}
    target_class = _find(spec["name"])
    if target_class is Tilt:
        arguments.setdefault("beta", beta)
    if target_class is Product:
        arguments["factors"] = [build_target(factor, beta) for factor in arguments.get("factors", [])]
    try:
        inspect.signature(target_class).bind(**arguments)
    except TypeError as error:
        takes = list(inspect.signature(target_class).parameters)
        raise ValueError(f"The target {spec['name']!r} takes {takes}: {error}.") from None
    return target_class(**arguments)


def _find(name: str) -> type[Target]:
    if name in _BY_NAME:
        return _BY_NAME[name]
    if "." not in name:
        close = get_close_matches(name, _BY_NAME, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"Unknown target {name!r}: use one of {sorted(_BY_NAME)} or the dotted path of a Target class.{hint}"
        )
    module_name, _, class_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: a relative or empty module
        raise ValueError(f"The target {name!r} cannot be imported: {error}.") from None
    if not (inspect.isclass(found) and issubclass(found, Target)) or inspect.isabstract(found):
        raise ValueError(f"The target {name!r} is not a concrete subclass of `trl_bayes.targets.Target`.")
    return found
