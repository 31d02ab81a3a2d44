"""Randomness that a model adds in training mode, and which makes the scored distribution another than the sampled."""

import copy
import re
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd


_NOISE = re.compile(r"drop|jitter")


def disable_noise(model: torch.nn.Module) -> None:
    """
    Switches off dropout wherever a model keeps it: modules, rates as attributes, rates read from the configuration.

    `torch.nn.Dropout` modules are the smaller part: Llama and OPT keep the rate of their attention's dropout as a
    number, Falcon and GPT-J read it from their configuration at every call, and mixtures of experts add noise to the
    router's input (`jitter_noise`). The configuration that the model is saved with stays as it is.

    Args:
        model (`torch.nn.Module`): a language model, with or without adapters.
    """
    quiet: dict[int, Any] = {}  # of each configuration, a copy without noise
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in _rates(vars(module)):
            setattr(module, name, 0.0)
        config = vars(module).get("config")
        if module is not model and config is not None and id(config) not in quiet:
            quiet[id(config)] = _without_noise(config)
        if module is not model and config is not None and not _is_saved(module):
            module.config = quiet[id(config)]


def adds_noise(model: torch.nn.Module) -> bool:
    """
    Whether a model drops anything in training mode, as far as its modules say it, those of adapters included.

    Args:
        model (`torch.nn.Module`): a language model, with or without adapters.
    """
    return any((isinstance(module, _DropoutNd) and module.p > 0) or _rates(vars(module)) for module in model.modules())


def _is_saved(module: torch.nn.Module) -> bool:
    """Whether it is a model whose configuration is written to disk: the one that has a generation configuration."""
    return "generation_config" in vars(module)


def _without_noise(config: Any) -> Any:
    """The configuration itself if it has no noise, else a copy without."""
    rates = _rates(vars(config)) if hasattr(config, "__dict__") else []
    if not rates:
        return config
    config = copy.copy(config)
    for name in rates:
        setattr(config, name, 0.0)
    return config


def _rates(attributes: dict[str, Any]) -> list[str]:
    """Names of rates of dropout and the like that are not zero."""
    return [
        name for name, value in attributes.items() if isinstance(value, float) and value != 0 and _NOISE.search(name)
    ]
