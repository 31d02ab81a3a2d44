"""What can be wrong about targets that learn from the prior, on the command line: one sentence, no traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trl_bayes import cli
from trl_bayes.benchmarks.tiny import letter_count_task


TASK = letter_count_task()


@pytest.fixture(scope="module")
def prior(letters_prior: str) -> str:
    return letters_prior


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        (
            "dpg",
            {"target": {"name": "moments", "mu": {"has_self": 0.5}}},
            "The target Moments reads the reward 'has_self', but the reward functions are ['length_in_characters']: "
            "use one of these names.",
        ),
        (
            "kl-rl",
            {"target": {"name": "calibrated", "transform": "best_of_n", "n": 4, "rewards": "length"}},
            "The target Calibrated reads the reward 'length', but the reward functions are ['length_in_characters']: "
            "use one of these names.",
        ),
        *(
            (
                "f-dpg",
                {"target": {"name": "log_sigmoid_centered", "quantile": quantile}},
                f"`LogSigmoidCentered` needs a `quantile` between 0 and 1, both excluded, got {quantile}.",
            )
            for quantile in (0.0, 1.0, 85)
        ),
        (
            "kl-rl",
            {"target": {"name": "calibrated", "transform": "best_of_n", "n": 1}},
            "`best_of_n` needs a whole number `n` of at least 2 (best of how many), got 1.",
        ),
        (
            "ctrl",
            {"inference_n": 1},
            "`inference_n=1` leaves nothing to choose from: set it to 2 or more, or use KLRLTrainer for a policy that "
            "is sampled from once.",
        ),
        (
            "tb",
            {"partition": "prior_samples", "num_prior_samples": 1},
            "`num_prior_samples=1` is too few to learn from: set it to 2 or more.",
        ),
        (
            "dpg",
            {"target": {"name": "moments", "mu": {}}},
            "`Moments` needs a mapping of feature names to moments, {'female': 0.5}, got {}.",
        ),
    ],
)
def test_one_sentence(
    command: str,
    settings: dict[str, Any],
    message: str,
    prior: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(command, recipe(prior) | settings) == message


def recipe(prior: str) -> dict[str, Any]:
    """What all recipes here begin with; their data is written to the current folder."""
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in TASK.prompts * 2))
    return {
        "model_name_or_path": prior,
        "dataset_name": "prompts.jsonl",
        "reward_funcs": [{"name": "length_in", "unit": "characters"}],
        "output_dir": "out",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }


def test_what_turns_out_from_the_prior_is_one_sentence_too(
    prior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = recipe(prior) | {
        "num_prior_samples": 50,
        "max_steps": 1,
        "save_strategy": "no",
        "max_completion_length": 4,
        "disable_tqdm": True,  # a bar leaves its line open
    }
    reachable, out_of_reach = ({"name": "moments", "mu": {"length_in_characters": mu}} for mu in (4.0, 1000.0))
    said = refusal("dpg", {**settings, "target": out_of_reach})
    assert "length_in_characters" in said and "1000" in said
    first = {**settings, "target": reachable, "prior_samples_dir": "kept", "output_dir": "first"}
    Path("recipe.yaml").write_text(json.dumps(first))
    cli.main(["dpg", "--config", "recipe.yaml"])
    next(Path("kept").rglob("samples-*.parquet")).write_bytes(b"not a table")
    said = refusal("dpg", {**first, "output_dir": "second"})
    assert said.startswith("kept/") and said.endswith("delete it, and it is made again.")
