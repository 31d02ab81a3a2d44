"""`demo-rl` under ZeRO-3: one process draws and measures by a model of its own, while the others wait for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.distributed.conftest import write_config
from tests.helpers.demonstrations import DEMONSTRATIONS, VOWELS
from trl_bayes import cli


pytestmark = pytest.mark.slow
MODULE = "rewards_of_test_stages"
COMMON = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0,
    "max_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def write_recipe(model: str, num_processes: int) -> None:
    """The same batches of all processes together, for any number of them."""

    def per_device(batch_size: int) -> dict[str, Any]:
        return {**COMMON, "max_completion_length": 6, "per_device_train_batch_size": batch_size // num_processes}

    recipe = {
        "output_dir": f"out_{num_processes}",
        "clone": {
            "model_name_or_path": model,
            "dataset_name": "demonstrations.jsonl",
            "held_out": 4,
            "prior_demonstrations": 8,
            **per_device(8),
        },
        "reward": {
            "preference_funcs": [f"{MODULE}.vowels", {"name": "length_in", "unit": "characters"}],
            "preference_weights": [1.0, -0.01],
            "num_pairs": 16,
            **per_device(4),
        },
        "rl": {"trainer": "KLRLTrainer", "beta": 0.1, "num_generations": 4, **per_device(8)},
    }
    Path(f"recipe_{num_processes}.yaml").write_text(yaml.safe_dump(recipe))


def weights(kind: Any, folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.float() for name, weight in kind.from_pretrained(folder).state_dict().items()}


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((weight - other[name]).abs().max().item() for name, weight in one.items())


@pytest.mark.usefixtures("deepspeed_is_built")
def test_all_stages_do_what_one_process_does(
    launch_line: Callable[..., Any], tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "TRL_BAYES_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    Path(f"{MODULE}.py").write_text(VOWELS)
    Path("demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    for num_processes in (1, 2):
        write_recipe(tiny_models.policy, num_processes)
    config = write_config("zero3", tmp_path)
    finished = launch_line(config, "-m", "trl_bayes.commands.demo_rl", "--config", "recipe_2.yaml")
    assert "The model is in out_2/rl." in finished.log.read_text(), finished.tail()
    cli.main(["demo-rl", "--config", "recipe_1.yaml"])

    one, two = Path("out_1"), Path("out_2")
    clone, reward = AutoModelForCausalLM, AutoModelForSequenceClassification
    start = weights(clone, Path(tiny_models.policy))
    assert largest(weights(clone, two / "clone"), start) > 1e-3
    for kind, stage in ((clone, "clone"), (reward, "reward")):
        assert largest(weights(kind, one / stage), weights(kind, two / stage)) < 1e-5
        figures = [json.loads((folder / stage / "stage.json").read_text())["figures"] for folder in (one, two)]
        assert figures[0].keys() == figures[1].keys() and figures[0].get("pairs") == figures[1].get("pairs")
    before, after = weights(reward, two / "clone"), weights(reward, two / "reward")
    assert max((after[name] - before[name]).abs().max() for name in before if name.startswith("model.")) > 1e-4
    # The policies' completions are not those of one process, which has other random numbers
    assert largest(weights(clone, two / "rl"), weights(clone, two / "clone")) > 1e-5
    for stage in ("clone", "reward", "rl"):
        assert_sharded(two / stage / "checkpoint-2" / "global_step2")


def assert_sharded(folder: Path) -> None:
    """Each process has kept half of every weight: else nothing of this has been under ZeRO-3."""
    shares = []
    for rank in (0, 1):
        state = torch.load(folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", weights_only=False)
        shares.append(sum(group.numel() for group in state["optimizer_state_dict"]["fp32_flat_groups"]))
        model = torch.load(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", weights_only=False)
        whole = sum(shape.numel() for shapes in model["param_shapes"] for shape in shapes.values())
    assert shares[0] == shares[1] and shares[0] == pytest.approx(whole / 2, rel=0.01)
