"""Which weights a model stands for, so that what was computed with others is not mistaken for theirs."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch


_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
_READ_WHOLE = 2**30  # bytes up to which a file is read whole
_PARTS, _PART_SIZE = 16, 4096  # of each tensor in a larger one: how many are read, evenly spread, and their bytes
_ELEMENTS = 64  # of each tensor that are read, evenly spread, besides the sum of all
# Of a configuration: where it came from and how it is loaded, which say nothing of what the model computes
_ABOUT_LOADING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_fingerprint(model_id: str) -> str | None:
    """
    A fingerprint of the model in a local folder; `None` for a model of the Hub, whose commit says the same.

    It reads the configuration and all weights, of files over a gigabyte 16 parts of each tensor: two models may differ
    in a single matrix. Each file is read once in a process. An adapter has its base model in its fingerprint.

    Args:
        model_id (`str`): folder, or id on the Hub.
    """
    files = sorted(file for pattern in _WEIGHTS for file in Path(model_id).glob(pattern))
    if not files:
        return None
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for file, own in zip(files, pool.map(_file_digest, files), strict=True):
            digest.update(f"{file.name} {own} ".encode())
    for name in ("config.json", "adapter_config.json"):
        config = _read_config(Path(model_id) / name)
        digest.update(json.dumps(plain_config(config), sort_keys=True).encode())
        base = config.get("base_model_name_or_path")
        digest.update(str(base and (weights_fingerprint(base) or base)).encode())
    return digest.hexdigest()[:16]


def model_fingerprint(model_id: str, model: torch.nn.Module) -> str | None:
    """
    A fingerprint of a model's weights, wherever they come from.

    Args:
        model_id (`str`): folder, or id on the Hub, that it was loaded from.
        model ([`~transformers.PreTrainedModel`]): the loaded model.

    Returns:
        `str`, *optional*: by the files of a folder; else by the commit on the Hub; else by the parameters themselves.
            `None` if these are not all on this process. Weights that are quantized are others.
    """
    config = getattr(model, "config", None)
    commit = getattr(config, "_commit_hash", None)
    found = (
        weights_fingerprint(model_id)
        or (f"{model_id}@{commit}" if commit else None)
        or parameters_fingerprint(dict(model.named_parameters()))
    )
    quantization = getattr(config, "quantization_config", None)
    if found is None or quantization is None:
        return found
    settings = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    return f"{found} {hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]}"


def parameters_fingerprint(parameters: Mapping[str, torch.Tensor]) -> str | None:
    """
    A fingerprint of tensors in memory: of each the sum of its bits, and 64 elements.

    Args:
        parameters (`dict[str, torch.Tensor]`): by name.

    Returns:
        `str`, *optional*: `None` if some are not all on this process (ZeRO-3, FSDP).
    """
    digest = hashlib.sha256()
    for name, tensor in parameters.items():
        if type(tensor).__name__ == "DTensor" or hasattr(tensor, "ds_id"):
            return None
        flat = tensor.detach().contiguous().flatten()
        bits = flat.view(_INTEGERS[flat.element_size()]) if flat.dtype != torch.bool else flat.to(torch.int8)
        chosen = bits[torch.linspace(0, max(len(bits) - 1, 0), _ELEMENTS).long()] if len(bits) else bits
        # Integers add up to the same in any order, on any device
        numbers = [*chosen.tolist(), bits.sum(dtype=torch.int64).item()]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {numbers} ".encode())
    return digest.hexdigest()[:16]


def path_fingerprint(text: str) -> str | None:
    """A fingerprint of what is in a file, or of the model in a folder, if a text is the path of one."""
    if not 0 < len(text) < 1000 or "\n" in text or "\0" in text:
        return None
    try:
        path = Path(text)
        return _file_digest(path) if path.is_file() else weights_fingerprint(text) if path.is_dir() else None
    except OSError:
        return None


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's configuration says of what it computes."""
    return {name: value for name, value in config.items() if name not in _ABOUT_LOADING}


def _read_config(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _file_digest(file: Path) -> str:
    found = file.stat()
    return _digest_of(file.resolve(), found.st_size, found.st_mtime_ns)


@cache
def _digest_of(file: Path, size: int, changed: int) -> str:
    """Of a file's content, which is read again if its size or the time of its last change is another."""
    with file.open("rb") as content:
        if size <= _READ_WHOLE or file.suffix != ".safetensors":
            return hashlib.file_digest(content, "sha256").hexdigest()
        return _digest_of_tensors(content)


def _digest_of_tensors(content: BinaryIO) -> str:
    """Of parts of each tensor of a safetensors file, whose JSON header says where they are, behind its own length."""
    length = int.from_bytes(content.read(8), "little")
    header = content.read(length)
    digest = hashlib.sha256(header)
    places = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
    for begin, end in places:
        for part in range(_PARTS):
            content.seek(8 + length + begin + part * max(end - begin - _PART_SIZE, 0) // (_PARTS - 1))
            digest.update(content.read(min(_PART_SIZE, end - begin)))
    return digest.hexdigest()
