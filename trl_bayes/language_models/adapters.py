"""PEFT adapters, which are read as models: their base model with them."""

import json
from pathlib import Path

from transformers.utils import find_adapter_config_file


_WHOLE = ("model*.safetensors", "pytorch_model*.bin")
"""Weights of a model that is whole; an adapter's folder may have the base model's `config.json`."""


def base_of_adapter(name: str, revision: str = "main") -> str | None:
    """
    The base model of an adapter; `None` for a model that is whole.

    Args:
        name (`str`): id or folder.
        revision (`str`, *optional*, defaults to `"main"`): of an id.

    Raises:
        OSError, ValueError, KeyError: it has a configuration that cannot be read, or that names no base model.
    """
    file = find_adapter_config_file(name, revision=revision)
    if file is None or any(any(Path(name).glob(weights)) for weights in _WHOLE):
        return None
    return str(json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"])
