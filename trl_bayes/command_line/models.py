"""The models of a recipe, and their tokenizers: found, checked and loaded in the same way by all commands."""

import os
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_quantization_config
from trl.trainer.utils import create_model_from_path

from ..assets import embedded_path
from ..language_models.adapters import base_of_adapter
from ..language_models.generation import refuse_encoder_decoder
from ..trainers.posterior_config import PosteriorConfig
from .extras import require_extra


if TYPE_CHECKING:
    from peft import PeftModel


def model_path(name: str) -> str:
    """Where a model is: a shipped one's folder, a folder with `~` written out, and an id as it is."""
    return os.path.expanduser(embedded_path(name))


def loading_arguments(model: ModelConfig, training: PosteriorConfig) -> dict[str, Any]:
    """What `from_pretrained` is given for the models of a run."""
    return {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": training.trust_remote_code,
    } | cast("dict[str, Any]", training.model_init_kwargs or {})


# ---------------------------------------------------------------------------------------------------------------------
# Whether they are there


def find_config(field_name: str, name: str, trust_remote_code: bool, revision: str = "main") -> PretrainedConfig:
    """
    The configuration of a model, or of the base model of an adapter; no weights are read.

    Raises:
        ValueError: there is no such model; one sentence.
        ImportError: it is an adapter, and peft is not installed.
    """
    try:
        base = base_of_adapter(name, revision)
        if base is None:
            return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        message = f"`{field_name}`: the model {name!r} cannot be loaded ({first_sentence(error)})."
        raise ValueError(message) from None
    require_extra("peft", f"{name!r} is an adapter, which")
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{field_name}`: the base model {base!r} of the adapter {name!r} cannot be loaded "
            f"({first_sentence(error)})."
        ) from None


def find_tokenizer(name: str, arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    """
    [`load_tokenizer`], for a check before anything else is loaded.

    Raises:
        ValueError: there is none; one sentence.
    """
    try:
        return load_tokenizer(name, arguments)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model_name_or_path`: the tokenizer of {name!r} cannot be loaded ({first_sentence(error)})."
        ) from None


def first_sentence(error: BaseException) -> str:
    """The first line of an error's message, to be put in brackets."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:")


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_tokenizer(name: str, arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a model, or of an adapter's base model where the adapter has none.

    Args:
        name (`str`): id or folder.
        arguments (`dict`): from [`loading_arguments`].
    """
    settings: dict[str, Any] = {key: arguments[key] for key in ("revision", "trust_remote_code") if key in arguments}
    settings |= {"padding_side": "left", "truncation_side": "left"}  # as TRL has it
    base = base_of_adapter(name, settings.get("revision", "main"))
    try:
        return AutoTokenizer.from_pretrained(name, **settings)
    except (OSError, ValueError):
        if base is None:
            raise
        return AutoTokenizer.from_pretrained(base, **{**settings, "revision": "main"})


def load_trainable_adapter(name: str, arguments: dict[str, Any], quantization_config: Any) -> "PeftModel":
    """
    An adapter to be trained on, on its base model. TRL keeps a copy of it as it was, which is then the prior.

    Args:
        name (`str`): id or folder.
        arguments (`dict`): from [`loading_arguments`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): of the base model.
    """
    from peft import PeftModel

    revision = arguments.get("revision", "main")
    settings = {key: value for key, value in arguments.items() if key != "revision"}
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    base = create_model_from_path(str(base_of_adapter(name, revision)), **settings)
    return PeftModel.from_pretrained(base, name, is_trainable=True, revision=revision)


def load_model(
    name: str,
    model: ModelConfig,
    training: PosteriorConfig,
    device: str | None = None,
    *,
    revision: str | None = None,
    quantized: bool = True,
) -> PreTrainedModel:
    """
    A model to sample from, in eval mode on the device; of an adapter, its base model with it.

    Args:
        name (`str`): id or folder.
        model ([`~trl.ModelConfig`]), training ([`~trl_bayes.trainers.posterior_config.PosteriorConfig`]):
            Of the run: this model is loaded as training loads its own, but for the device.
        device (`str`, *optional*): as [`choose_device`] has it.
        revision (`str`, *optional*): of this model. Defaults to its newest.
        quantized (`bool`, *optional*, defaults to `True`): whether quantization is meant for this model too.

    Raises:
        ValueError: the device cannot be used, or this kind of model; one sentence.
    """
    settings = {**loading_arguments(model, training), "revision": revision or "main"}
    quantization_config = get_quantization_config(model) if quantized else None
    where = choose_device(device, training)
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
        settings.setdefault("device_map", {"": where})  # weights that are quantized cannot be moved
    settings.setdefault("device_map", None)
    architecture: Any = None if base_of_adapter(name, settings["revision"]) is None else AutoModelForCausalLM
    loaded: Any = create_model_from_path(name, architecture, **settings)
    refuse_encoder_decoder(loaded)
    return (loaded.to(where) if settings["device_map"] is None else loaded).eval()


def choose_device(device: str | None, training: PosteriorConfig) -> torch.device:
    """
    The device of a study: the one that is named, or else a GPU if there is one and `use_cpu` does not say otherwise.

    Raises:
        ValueError: it cannot be used; one sentence.
    """
    name = device or ("cuda" if torch.cuda.is_available() and not training.use_cpu else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device={name}` cannot be used: {first_sentence(error)}.") from None
