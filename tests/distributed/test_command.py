"""The launch line of a cluster, in two processes without a GPU: from a recipe to a saved model."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes.assets import EMBEDDED, embedded_path, shipped_file


pytestmark = pytest.mark.slow
MODULE = "reward_of_test_command"
# The reward is that of the recipe; each process that calls it says who it is
SOURCE = """
import os
from pathlib import Path
from trl_bayes.rewards.python_syntax import parses

def parses_and_tells(prompts, completions, **kwargs):
    Path(__file__).with_name("process_" + os.environ["RANK"]).write_text(os.environ["WORLD_SIZE"])
    return parses(prompts, completions)
"""
SMALL = {
    "reward_funcs": [f"{MODULE}.parses_and_tells"],
    "output_dir": "out",
    "per_device_train_batch_size": 10,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "save_only_model": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.mark.usefixtures("deepspeed_is_built")
def test_zero3_trains_a_recipe(launch_line: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    recipe = yaml.safe_load(shipped_file("recipes/python_syntax/f_dpg.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | SMALL))
    config = shipped_file("accelerate_configs/cpu_zero3.yaml")
    finished = launch_line(config, "-m", "trl_bayes.commands.f_dpg", "--config", "recipe.yaml")
    assert "The model is in out." in finished.log.read_text(), finished.tail()

    assert [(tmp_path / f"process_{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    shards = {file.name for file in (tmp_path / "out" / "checkpoint-2" / "global_step2").iterdir()}
    assert {f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)} <= shards  # of ZeRO-3 only
    assert all((tmp_path / "out" / "checkpoint-2" / f"posterior_state_{rank}.pt").exists() for rank in (0, 1))

    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    steps = [log for log in history if "loss" in log]
    assert len(steps) == 2 and all(math.isfinite(log["grad_norm"]) and log["grad_norm"] > 0 for log in steps)
    assert all(0 <= log["posterior/frac_no_evidence"] <= 1 for log in steps)
    prior = embedded_path(f"{EMBEDDED}python_lines")
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (prior, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(weight.shape == after[name].shape and weight.isfinite().all() for name, weight in before.items())
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == AutoTokenizer.from_pretrained(prior).get_vocab()
    )
    assert "f-DPG" in (tmp_path / "out" / "README.md").read_text()
