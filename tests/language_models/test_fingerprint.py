"""Fingerprints of models: the same weights wherever they are, and no others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_bayes.language_models import fingerprint as fingerprint_module
from trl_bayes.language_models.fingerprint import (
    model_fingerprint,
    parameters_fingerprint,
    path_fingerprint,
    weights_fingerprint,
)


def test_weights_in_a_folder(tmp_path: Path) -> None:
    assert weights_fingerprint("some/model") is None
    assert weights_fingerprint(str(tmp_path)) is None
    (tmp_path / "model.safetensors").write_bytes(bytes(3_000_000))
    first = weights_fingerprint(str(tmp_path))
    assert first == weights_fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(bytes(2_999_999) + b"1")
    assert first != weights_fingerprint(str(tmp_path))
    for place in (100_000, 1_234_567):  # one matrix may be all that differs
        (tmp_path / "model.safetensors").write_bytes(bytes(place) + b"1" + bytes(2_999_999 - place))
        assert first != weights_fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert weights_fingerprint(str(tmp_path)) is not None


def test_the_configuration_counts_but_for_how_it_is_loaded(tiny_models: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_models.policy, tmp_path / "copy"))
    before = weights_fingerprint(tiny_models.policy)
    assert weights_fingerprint(str(folder)) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "9", "dtype": "bfloat16"}))
    assert weights_fingerprint(str(folder)) == before
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert weights_fingerprint(str(folder)) != before


def test_an_adapter_has_its_base_model_in_its_fingerprint(tiny_models: Any, tmp_path: Path) -> None:
    """The same adapter on a base model that was trained again is another model."""
    base = str(shutil.copytree(tiny_models.policy, tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    before = weights_fingerprint(str(tmp_path / "adapter"))
    assert before not in (None, weights_fingerprint(base))
    changed = AutoModelForCausalLM.from_pretrained(base)
    changed.lm_head.weight.data[0, 0] += 0.1
    changed.save_pretrained(base)
    assert weights_fingerprint(str(tmp_path / "adapter")) not in (None, before)


def test_a_model_by_its_folder_its_commit_or_its_parameters(tiny_models: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    assert model_fingerprint(tiny_models.policy, model) == weights_fingerprint(tiny_models.policy)
    by_parameters = model_fingerprint("of/nowhere", model)
    assert by_parameters == parameters_fingerprint(dict(model.named_parameters()))
    model.config._commit_hash = "abc"
    assert model_fingerprint("of/nowhere", model) == "of/nowhere@abc"
    model.config._commit_hash = None
    model.lm_head.weight.data[1, 1] += 1e-3
    assert model_fingerprint("of/nowhere", model) not in (None, by_parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_every_bit_of_a_tensor_counts(dtype: torch.dtype) -> None:
    """Wherever it is: the sum of the bits sees it."""
    values = (torch.arange(10_000) % 2).to(dtype)
    before = parameters_fingerprint({"a": values})
    assert parameters_fingerprint({"a": values.clone()}) == before
    assert parameters_fingerprint({"b": values}) != before
    assert parameters_fingerprint({"a": values.view(100, 100)}) != before
    values[7777] = 0
    assert parameters_fingerprint({"a": values}) != before
    assert parameters_fingerprint({"a": values[:0]}) is not None


def test_what_is_not_all_here_has_none() -> None:
    partition = torch.nn.Parameter(torch.empty(0))
    partition.ds_id = 3  # as ZeRO-3 marks a parameter that it has taken away
    assert parameters_fingerprint({"a": torch.ones(2), "b": partition}) is None


@pytest.mark.parametrize("text", ["", "no such file", "a\nb", "a\0b", "x" * 5000, "\ud800"])
def test_what_is_no_path(text: str) -> None:
    assert path_fingerprint(text) is None


def test_files_and_folders(tmp_path: Path, tiny_models: Any) -> None:
    assert path_fingerprint(str(tmp_path)) is None  # without a model
    assert path_fingerprint(tiny_models.policy) == weights_fingerprint(tiny_models.policy)
    (tmp_path / "file").write_text("a")
    before = path_fingerprint(str(tmp_path / "file"))
    (tmp_path / "file").write_text("b")
    assert path_fingerprint(str(tmp_path / "file")) not in (None, before)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_of_a_large_file_parts_of_each_tensor_are_read(
    name: str, tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models may differ in a single one."""
    whole = weights_fingerprint(tiny_models.policy)
    monkeypatch.setattr(fingerprint_module, "_READ_WHOLE", 0)
    fingerprint_module._digest_of.cache_clear()
    before = weights_fingerprint(tiny_models.policy)
    assert before != whole
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    model.save_pretrained(tmp_path / "same")
    model.get_parameter(name).data.flatten()[-1] += 0.1
    model.save_pretrained(tmp_path / "other")
    assert weights_fingerprint(str(tmp_path / "same")) == before != weights_fingerprint(str(tmp_path / "other"))
    fingerprint_module._digest_of.cache_clear()


def test_what_a_training_leaves_beside_weights_does_not_count(tiny_models: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_models.policy, tmp_path / "copy"))
    (folder / "training_args.bin").write_bytes(b"1")
    assert weights_fingerprint(str(folder)) == weights_fingerprint(tiny_models.policy)


def test_quantized_weights_are_others(tiny_models: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    plain = model_fingerprint(tiny_models.policy, model)
    model.config.quantization_config = {"load_in_4bit": True}
    four = model_fingerprint(tiny_models.policy, model)
    model.config.quantization_config = {"load_in_4bit": False, "load_in_8bit": True}
    assert len({plain, four, model_fingerprint(tiny_models.policy, model)}) == 3
