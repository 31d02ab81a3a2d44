"""Keys that nothing knows: all of them are named, and those that others renamed or removed have a hint that helps."""

from collections.abc import Callable
from typing import Any

import pytest

from trl_bayes import FDPGTrainer
from trl_bayes.command_line import unknown_keys
from trl_bayes.command_line.launch import launcher_actions
from trl_bayes.command_line.recipe import trainers, training_parser


def known_fields() -> set[str]:
    """Of all training commands, with those of the launcher."""
    fields = {name for trainer in trainers().values() for name in training_parser("x", trainer).fields}
    return fields | launcher_actions().keys()


def test_every_hint_is_about_what_is_not_there_and_names_what_is() -> None:
    """An upgrade of TRL or transformers that adds or removes one of these fields fails here."""
    fields = known_fields()
    hinted = {**unknown_keys._RENAMED, **unknown_keys._REMOVED}
    assert len(hinted) == len(unknown_keys._RENAMED) + len(unknown_keys._REMOVED)
    assert hinted.keys() & fields == {"missing_eos_penalty"}  # XPOConfig has it, and no other
    assert set(unknown_keys._RENAMED.values()) <= fields
    for advice in unknown_keys._REMOVED.values():
        for name in advice.split("`")[1::2]:
            assert name.partition(":")[0] in fields | {"env", "product"}, name


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("max_prompt_length", "prompts are not cut: leave it out"),
        ("torch_dtype", "here it is `dtype`"),
        ("overwrite_output_dir", "here it is `overwrite`"),
        ("warmup_ratio", "set `warmup_steps`, where a number below 1 is a share of all steps"),
        ("num_epochs", "here it is `num_train_epochs`"),
        ("num_train_epoch", "here it is `num_train_epochs`"),
        ("num_train_epocs", "did you mean 'num_train_epochs'?"),
        ("evaluation_strategy", "here it is `eval_strategy`"),
        ("max_new_tokens", "here it is `max_completion_length`"),
        ("kl_coef", "here it is `beta`"),
        ("vllm_device", "set `vllm_mode`"),
        ("model_name", "here it is `model_name_or_path`"),
        ("micro_batch_size", "here it is `per_device_train_batch_size`"),
        ("num_return_sequences", "here it is `num_generations`"),
        ("max_seq_length", "prompts are not cut: set `max_completion_length`"),
    ],
)
@pytest.mark.parametrize("command", ["f-dpg", "evaluate", "sample"])
def test_hints(
    key: str, hint: str, command: str, refusal: Callable[..., str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"Unknown key `{key}` in recipe.yaml ({hint}" in refusal(command, {key: 1})
    if command == "f-dpg":
        flag = refusal(command, {}, f"--{key}", "1")
        of_flag = hint.replace("'num_train", "'--num_train")
        assert flag.startswith(f"Unknown argument `--{key}` ({of_flag}")


def test_all_unknown_keys_are_named_at_once(
    refusal: Callable[..., str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {"warmup_ratio": 0.1, "num_generation": 4, "zzz": 1, "beta": 0.1, "torch_dtype": "bfloat16"}
    expected = [
        "Unknown keys in recipe.yaml: ",
        "`num_generation` (did you mean 'num_generations'?)",
        "`torch_dtype` (here it is `dtype`)",
        "`warmup_ratio` (set `warmup_steps`, where a number below 1 is a share of all steps)",
        "`zzz`: see --help.",
    ]
    for command in ("f-dpg", "evaluate"):
        said = refusal(command, recipe)
        assert all(part in said for part in expected), said
    said = refusal("f-dpg", {}, "--torch_dtype", "bfloat16", "--num-generation=4", "--beta", "1", "--zzz")
    assert said.startswith("Unknown arguments: `--torch_dtype` (here it is `dtype`), `--num-generation` (did you mean")
    assert "`--zzz`" in said


def test_no_hint_names_what_another_command_has(
    refusal: Callable[..., str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sample` has `num_steps`, of MCMC; a flag of training is none of `evaluate`."""
    monkeypatch.chdir(tmp_path)
    assert "max_steps" in refusal("f-dpg", {"num_steps": 3})
    assert refusal("evaluate", {}, "--epochs", "3").startswith("Unknown argument `--epochs`")
    assert "num_train_epochs" not in refusal("evaluate", {}, "--epochs", "3")
    assert FDPGTrainer.__name__ in trainers()
