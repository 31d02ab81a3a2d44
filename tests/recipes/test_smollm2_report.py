"""The report of a study of SmolLM2: of the seeds that each method has, and of methods that are done."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
ANSWER = [{"role": "assistant", "content": '{"name": "Ann"}'}]


def evaluated(folder: Path, runs: dict[str, float], num_prior: int) -> None:
    """An evaluation of policies by their KL to the prior; the prior's log Z says with how many samples it was made."""

    def record(name: str, kl_prior: float) -> dict[str, Any]:
        metric = {"value": kl_prior, "standard_error": 0.1, "trusted": True}
        return {"name": name, "evaluation": {"metrics": {"kl_prior": metric}}}

    (folder / "samples").mkdir(parents=True)
    line = json.dumps({"prompt": "a", "rewards": [1.0], "completion": ANSWER}) + "\n"
    for name, number in (("prior", num_prior), ("posterior", num_prior), *((name, 30) for name in runs)):
        (folder / "samples" / f"{name}.jsonl").write_text(line * number, encoding="utf-8")
    found = {"prior": record("prior", 0.0), "posterior": record("posterior", float(num_prior))}
    found |= {"runs": [record(name, kl) for name, kl in runs.items()]}
    (folder / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")


def trained(folder: Path, num_updates: int) -> None:
    log = [{"step": step + 1, "reward": float(step >= num_updates / 2)} for step in range(num_updates)]
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"max_steps": num_updates, "log_history": log}))


def test_each_method_has_seeds_of_its_own(tmp_path: Path) -> None:
    recipes, runs = tmp_path / "smollm2", tmp_path / "runs"
    shutil.copytree(ROOT / "recipes/smollm2", recipes)
    methods = {"kl_rl_beta_0_1": {5: 2.0, 6: 3.0, 7: 2.5}, "trl_grpo": {0: 9.0}}
    for name, found in methods.items():
        for split in ("train", "held_out"):
            policies = {f"{name}_{seed}": kl for seed, kl in found.items()}
            evaluated(runs / f"measured_{split}" / name, policies, 2 if len(found) == 3 else 4)
        for seed in found:
            trained(runs / f"{name}_{seed}", 50 if len(found) == 3 else 25)
    command = [sys.executable, str(recipes / "study.py"), "json", "--parts", "report", "--runs"]
    nothing = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, cwd=ROOT)
    assert nothing.returncode == 1 and nothing.stderr.startswith("Nothing has been measured in ")
    command.append(str(runs))
    subprocess.run([*command, "--seeds", "0", "5", "6", "7"], check=True, cwd=ROOT)
    text = (recipes / "json/results.md").read_text(encoding="utf-8")
    assert "| KL-RL (beta 0.1) | 100 % (100 to 100) | 2.50 (2.00 to 3.00) |" in text
    assert "| TRL GRPO | 100 % | 9.00 |" in text
    assert "| the exact posterior | 100 % | 4.00 |" in text  # of the evaluation with more samples
    assert "DPG" not in text  # not done
    assert (recipes / "json/results.png").stat().st_size > 10_000
