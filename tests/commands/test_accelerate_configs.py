"""The accelerate configurations that come with the package: accelerate itself reads each, and means what it says."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from trl_bayes import assets
from trl_bayes.assets import embedded_path, shipped_file


NAMES = ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "zero3_multi_node", "fsdp2_multi_node"]
CPU_NAMES = ["cpu_ddp", "cpu_zero2", "cpu_zero3"]


def test_these_are_all() -> None:
    assert {file.stem for file in shipped_file("accelerate_configs").glob("*.yaml")} == {*NAMES, *CPU_NAMES}


@pytest.mark.parametrize("name", [*NAMES, *CPU_NAMES])
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(shipped_file(f"accelerate_configs/{name}.yaml")))
    machines = 2 if name.endswith("multi_node") else 1
    assert config.num_machines == machines
    assert config.num_processes == (2 if name in CPU_NAMES else 8 * machines)
    assert config.mixed_precision == ("no" if name in CPU_NAMES else "bf16")
    assert config.use_cpu == (name == "cpu_ddp")  # with DeepSpeed the training arguments say it
    if "zero" in name:
        assert config.distributed_type == "DEEPSPEED"
        assert config.deepspeed_config["zero_stage"] == int(name.partition("zero")[2][0])
        offload = "cpu" if name == "zero3_offload" else "none"
        assert config.deepspeed_config.get("offload_optimizer_device", "none") == offload
    elif "fsdp2" in name:
        assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    else:
        assert config.distributed_type == "MULTI_GPU"


def test_files_are_found_in_an_installed_package_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site-packages" / "trl_bayes" / "accelerate_configs").mkdir(parents=True)
    installed = tmp_path / "site-packages" / "trl_bayes" / "accelerate_configs" / "zero3.yaml"
    installed.write_text("")
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path / "site-packages" / "trl_bayes")
    assert shipped_file("accelerate_configs/zero3.yaml") == installed
    with pytest.raises(FileNotFoundError, match="'recipes/nope.yaml' does not come with trl_bayes"):
        shipped_file("recipes/nope.yaml")


def test_embedded_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "config.json").write_text("{}")
    assert embedded_path("embedded:lines") == str(tmp_path / "lines")
    assert embedded_path("some/model") == "some/model"
    with pytest.raises(FileNotFoundError, match="'embedded:lines' has no prompts.jsonl in .*build_prior.py"):
        embedded_path("embedded:lines", "prompts.jsonl")
