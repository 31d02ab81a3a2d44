"""The recipes of `demo-rl` are checked as they stand, and run for an update of each stage."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from trl_bayes import cli
from trl_bayes.command_line.demonstration_recipe import DemonstrationArguments
from trl_bayes.command_line.demonstrations import prepare
from trl_bayes.command_line.parser import read_recipe
from trl_bayes.rewards import build_rewards, parses


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "demonstrations"
SMOLLM2 = ROOT / "recipes" / "smollm2" / "json" / "demo_rl.yaml"
RECIPES = [*sorted(FOLDER.glob("*.yaml")), SMOLLM2]


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the demonstrations, made by the script as the README says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lines_of_a_module.py", "--module", "turtle"])
    runpy.run_path(str(FOLDER / "lines_of_a_module.py"), run_name="__main__")
    return tmp_path / "runs" / "demonstrations" / "lines.jsonl"


def test_demonstrations_are_lines_that_parse(lines: Path) -> None:
    rows = [json.loads(row) for row in lines.read_text().splitlines()]
    assert len(rows) > 400 and {"", "self.", "return "} <= {row["prompt"] for row in rows}
    assert min(parses([row["prompt"] for row in rows], [row["completion"] for row in rows])) == 1.0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_as_it_stands(recipe: Path, lines: Path, tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_bayes.command_line.demonstrations.prepare_folder", lambda *args, **kwargs: None)
    config = read_recipe(str(recipe))
    if recipe == SMOLLM2:  # which is made by a command
        config["clone"]["model_name_or_path"] = tiny_models.policy
    for section in ("clone", "reward", "rl"):
        if section in config:
            config[section] |= {"use_cpu": True}
    job = prepare(DemonstrationArguments(**config), recipe.name)
    assert list(job.stages) == [name for name in ("clone", "reward", "rl") if name in config]
    line = f"trl-bayes demo-rl --config {recipe.relative_to(ROOT)}"
    assert f"# {line}" in recipe.read_text().splitlines()
    readme = (ROOT / "recipes" / recipe.relative_to(ROOT / "recipes").parts[0] / "README.md").read_text()
    assert line in re.findall(r"^trl-bayes .*$", readme, re.MULTILINE)


def test_smollm2_clones_objects_that_were_asked_for() -> None:
    """Four answers to each prompt of its last stage, which the reward of that stage accepts."""
    folder = SMOLLM2.parent
    rows, asked = (
        [json.loads(row) for row in (folder / name).read_text().splitlines()]
        for name in ("demonstrations.jsonl", "train.jsonl")
    )
    schemas = {json.dumps(row["prompt"]): row["schema"] for row in asked}
    prompts = [json.dumps(row["prompt"]) for row in rows]
    assert {prompt: prompts.count(prompt) for prompt in prompts} == dict.fromkeys(schemas, 4)
    completions = [row["completion"] for row in rows]
    (valid_json,) = build_rewards(["valid_json"])
    assert set(valid_json(completions=completions, schema=[schemas[prompt] for prompt in prompts])) == {1.0}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [FOLDER / "rlhf.yaml", SMOLLM2], ids=["rlhf", "smollm2"])
def test_recipe_runs(recipe: Path, lines: Path, tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That with all stages, and that with adapters; only their size is less."""
    for name in ("RANK", "LOCAL_RANK", "TRL_BAYES_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    less: dict[str, Any] = {f"{stage}.{key}": value for stage in ("clone", "reward", "rl") for key, value in {
        "max_steps": 1, "use_cpu": "true", "disable_tqdm": "true", "per_device_train_batch_size": 8,
    }.items()}  # fmt: skip
    less |= {"reward.num_pairs": 16, "rl.num_generations": 4, "clone.prior_demonstrations": 4, "clone.held_out": 8}
    config = read_recipe(str(recipe))
    if recipe == SMOLLM2:
        less["clone.model_name_or_path"] = tiny_models.policy
    sections = [name for name in ("clone", "reward", "rl") if name in config]
    flags = [word for key, value in less.items() if key.split(".")[0] in sections for word in (f"--{key}", str(value))]
    cli.main(["demo-rl", "--config", str(recipe), *flags])
    for stage in sections:
        folder = Path(config["output_dir"], stage)
        assert json.loads((folder / "stage.json").read_text())["finished"]
        assert any(folder.glob("*model.safetensors"))
