"""Every script of `recipes/scripts/` says what it needs, and trains for two updates on a tiny model and a few rows."""

import json
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest


FOLDER = Path(__file__).parents[2] / "recipes" / "scripts"
SCRIPTS = sorted(FOLDER.glob("*.py"))
ROW = {
    "question": "How many are 3 + 4?",
    "answer": "3 + 4 = 7\n#### 7",
    "text": "I rented this one because of all the talk about it.",
    "prompt": "The man in the moon",
}
# A tiny model writes no words: half of its completions are taken for the first of these, half for the second
WRITTEN = {
    "kl_rl": ("maths", ("#### 7", "#### 8")),
    "dpg_constraint": ("contains", ("amazing", "dull")),
    "moments": ("contains", ("She is here.", "He is here.")),
    "f_dpg": ("regex", ("It rained.", "It rained and")),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_head_names_what_it_needs(script: Path) -> None:
    head = re.match(r"# /// script\n((?:# .*\n)+?)# ///\n", script.read_text(encoding="utf-8"))
    assert head is not None
    needs = tomllib.loads(re.sub(r"^# ", "", head[1], flags=re.MULTILINE))
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert needs == {"requires-python": project["requires-python"], "dependencies": [project["name"]]}
    assert f"[{script.name}]({script.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_trains(script: Path, tmp_path: Path, tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(f"{json.dumps(ROW)}\n" * 8)
    if script.stem in WRITTEN:
        module, (good, bad) = WRITTEN[script.stem]
        judged = lambda text: good if len(str(text)) % 2 else bad  # noqa: E731 - the same text is judged the same
        monkeypatch.setattr(f"trl_bayes.rewards.{module}.completion_text", judged)
    flags = {"model": tiny_models.policy, "dataset": tmp_path / "data", "output_dir": tmp_path / "out"}
    flags |= {"max_steps": 2, "logging_steps": 1, "max_completion_length": 6, "num_generations": 8}
    flags |= {
        "per_device_train_batch_size": 16,
        "learning_rate": 0.01,
        "num_prior_samples": 512,
        "bf16": False,
        "save_steps": 2,
    }
    flags |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "bf16": False, "save_steps": 2}
    own = {"kl_rl": ["--config", "default"]}.get(script.stem, [])
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", [str(script), *words, *own])
    runpy.run_path(str(script), run_name="__main__")
    history = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    updates = [entry for entry in history if "loss" in entry]
    assert len(updates) == 2 and (tmp_path / "out" / "model.safetensors").is_file()
    assert any(entry["grad_norm"] > 0 for entry in updates)
