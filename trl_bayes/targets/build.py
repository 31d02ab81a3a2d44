"""Targets from configuration: a name, a mapping, a dotted path, or an object."""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ..rewards.specification import import_object, with_numbers
from .base import Target
from .calibrated import Calibrated
from .chi_squared import ChiSquared
from .constraint import Constraint
from .log_sigmoid import LogSigmoidCentered
from .moments import Moments
from .product import Product
from .tempered import Tempered
from .tilt import Tilt
from .transforms import build_transform


_BY_NAME: dict[str, type[Target]] = {
    "tilt": Tilt,
    "constraint": Constraint,
    "moments": Moments,
    "product": Product,
    "calibrated": Calibrated,
    "log_sigmoid_centered": LogSigmoidCentered,
    "tempered": Tempered,
    "chi_squared": ChiSquared,
}

TargetSpec = str | Mapping[str, Any] | Target


def build_target(spec: TargetSpec | None, beta: float) -> Target:
    """
    Makes a target from what a user writes.

    Args:
        spec (`str`, `Mapping` or [`Target`], *optional*):
            A name (`"constraint"`), a mapping with `name` and the target's arguments (`{"name": "tilt", "beta": 0.1}`;
            the factors of a `product` are such specifications, and the arguments of a `calibrated` target's transform
            stand beside its name: `{"name": "calibrated", "transform": "best_of_n", "n": 4}`), a dotted path to a
            [`Target`] class (`"my_package.targets.Mine"`), or a [`Target`]. `None` is `Tilt(beta)` over the weighted
            reward sum.
        beta (`float`):
            Temperature of a `tilt`, a `chi_squared` or a `calibrated` target that does not give its own (nor, the
            last, has a transform with one).

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
    if target_class is Calibrated and "transform" in arguments:
        arguments = _with_transform(arguments, beta)
    if target_class in (Tilt, ChiSquared):
        arguments.setdefault("beta", beta)
    if target_class is Product:
        arguments["factors"] = [build_target(factor, beta) for factor in arguments.get("factors", [])]
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


def _with_transform(arguments: dict[str, Any], beta: float) -> dict[str, Any]:
    """The arguments of `Calibrated`, with the transform made from its name and the arguments that are its own."""
    own = {key: value for key, value in arguments.items() if key not in inspect.signature(Calibrated).parameters}
    transform = build_transform(arguments["transform"], **own)
    default = beta if transform.default_beta is None else transform.default_beta
    rest = {key: value for key, value in arguments.items() if key not in own}
    return {"beta": default, **rest, "transform": transform}


def _find(name: str) -> type[Target]:
    if name in _BY_NAME:
        return _BY_NAME[name]
    if "." not in name:
        close = get_close_matches(name, _BY_NAME, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"Unknown target {name!r}: use one of {sorted(_BY_NAME)} or the dotted path of a Target class.{hint}"
        )
    found = import_object(name, "target")
    if not (inspect.isclass(found) and issubclass(found, Target)) or inspect.isabstract(found):
        raise ValueError(f"The target {name!r} is not a concrete subclass of `trl_bayes.targets.Target`.")
    return found
