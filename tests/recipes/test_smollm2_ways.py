"""The section "Ways to run" of recipes/smollm2: its lines, in their order, on a tiny model in the model's place."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_bayes import cli


ROOT = Path(__file__).parents[2]
MODEL = "models/smollm2-135m-instruct"
VALID = '{"name": "Ann", "age": 4, "city": "Bonn", "title": "x", "author": "y", "year": 1}'
SMALLER = {
    "max_steps": 2,
    "max_completion_length": 4,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}
OF_STUDIES = {"evaluate": ["--num_samples", "4", "--num_reference_samples", "6"], "sample": ["--max_attempts", "50"]}


def section() -> str:
    readme = (ROOT / "recipes/smollm2/README.md").read_text(encoding="utf-8")
    return readme.split("\n## Ways to run\n")[1].split("\n## ")[0]


def lines() -> list[list[str]]:
    blocks = re.findall(r"```(?:ba)?sh\n(.*?)```", section(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_every_line_in_turn(tmp_path: Path, tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first training of the page; of the two with checkpoints the second goes on after the first."""
    monkeypatch.chdir(tmp_path)
    written = itertools.cycle([VALID, "no"])  # a tiny model writes no JSON
    monkeypatch.setattr("trl_bayes.rewards.json_schema.completion_text", lambda completion: next(written))
    for words in [["trl-bayes", "kl-rl", "--config", "recipes/smollm2/json/kl_rl.yaml"], *lines()]:
        command, flags = words[1], [tiny_models.policy if word == MODEL else word for word in words[2:]]
        where = flags.index("--config") + 1
        recipe = yaml.safe_load((ROOT / flags[where]).read_text(encoding="utf-8"))
        recipe |= {**SMALLER, "model_name_or_path": tiny_models.policy}
        recipe["dataset_name"] = str(ROOT / recipe["dataset_name"])
        recipe["max_steps"] = 4 if "--resume_from_checkpoint" in flags else 2
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        flags[where] = "recipe.yaml"
        if command in OF_STUDIES:
            flags += [*OF_STUDIES[command], "--device", "cpu", "--max_prompts", "2"]
        if "--save_steps" in flags:
            flags[flags.index("--save_steps") + 1] = "1"
        cli.main([command, *flags])
        if "--save_steps" in flags:
            done = sorted(path.name for path in Path("runs/smollm2/json/kept").glob("checkpoint-*"))
            assert done == [f"checkpoint-{i}" for i in range(1, recipe["max_steps"] + 1)]
    (block,) = re.findall(r"```python\n(.*?)```", section(), re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    merged = {path.name for path in Path("runs/smollm2/json/merged").iterdir()}
    assert "model.safetensors" in merged and "adapter_config.json" not in merged
    assert Path("runs/smollm2/json/measured/evaluation.json").is_file()
