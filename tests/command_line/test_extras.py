"""What needs an optional package that is not installed says which, in one sentence, before anything is loaded."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from trl_bayes import cli
from trl_bayes.command_line.extras import require_extra


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes packages missing, for whoever asks whether they are there."""
    found = importlib.util.find_spec

    def hide(*packages: str) -> None:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name in packages else found(name, *a)
        )

    return hide


def test_names_the_extra(without: Any) -> None:
    require_extra("peft", "An adapter")  # it is installed
    without("peft")
    with pytest.raises(
        ImportError, match=r'^An adapter needs the package peft, which .* `pip install "trl_bayes\[peft\]"`'
    ):
        require_extra("peft", "An adapter")


@pytest.mark.parametrize(
    ("flags", "package", "sentence"),
    [
        (["--use_peft"], "peft", "`use_peft` needs the package peft, which"),
        (
            ["--use_vllm"],
            "vllm",
            '`use_vllm` needs the package vllm, which is not installed: `pip install "trl_bayes[vllm]"`',
        ),
        (["--use_liger_kernel"], "liger_kernel", "which is not installed: `pip install liger-kernel`"),
    ],
)
def test_fields_of_a_recipe_ask_for_theirs(
    flags: list[str], package: str, sentence: str, without: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    without(package)
    recipe = ["--config", "recipes/python_syntax/dpg.yaml", "--use_cpu", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["dpg", *recipe, *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error and "Loading weights" not in error


@pytest.mark.parametrize("flags", [["--accelerate_config", "zero3"], ["--use_deepspeed"]])
def test_deepspeed_is_asked_for_before_the_launch(
    flags: list[str], without: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_bayes.command_line.launch.launch_command", lambda args: pytest.fail("it was launched"))
    without("deepspeed")
    recipe = ["--config", "recipes/python_syntax/dpg.yaml", "--use_cpu"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["dpg", *recipe, *flags])
    assert stopped.value.code == 2
    assert "needs the package deepspeed, which is not installed" in capsys.readouterr().err


def test_adapters_ask_for_peft(
    without: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_models: Any
) -> None:
    adapter = {"base_model_name_or_path": tiny_models.policy, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    without("peft")
    data = [
        "--dataset_name",
        "embedded:python_lines",
        "--reward_funcs",
        "parses",
        "--target",
        "constraint",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sample", "--model_name_or_path", str(tmp_path), *data, "--max_completion_length", "4"])
    assert stopped.value.code == 2
    assert "is an adapter, which needs the package peft, which is not installed" in capsys.readouterr().err
