"""`trl-bayes evaluate` goes on where it was stopped, and stops by itself when there is enough."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel

from trl_bayes import cli
from trl_bayes.benchmarks.tiny import balance_task, build_tiny_model
from trl_bayes.language_models import scoring
from trl_bayes.language_models.completions import Completions
from trl_bayes.prior import drawing, log_probs


TASK = balance_task()
PROMPTS = len(TASK.prompts)


class Counted:
    """How many completions have been drawn and scored; drawing can be made to fail, as a kill would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.drawn = self.scored = 0
        self.limit: int | None = None
        generate, score = drawing.generate, scoring.log_probs

        def generating(model: PreTrainedModel, rows: list[list[int]], settings: Any) -> list[list[int]]:
            if self.limit is not None and self.drawn + len(rows) > self.limit:
                raise KeyboardInterrupt
            self.drawn += len(rows)
            return generate(model, rows, settings)

        def scoring_(model: PreTrainedModel, completions: Completions, settings: Any) -> Any:
            self.scored += len(completions)
            return score(model, completions, settings)

        monkeypatch.setattr(drawing, "generate", generating)
        monkeypatch.setattr(log_probs, "log_probs", scoring_)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made = {"prior": TASK.build_model(folder / "prior")}
    for seed, name in enumerate(("first", "second"), start=5):
        made[name] = build_tiny_model(folder / name, TASK.letters, seed=seed, logit_std=0.7)
    return made


@pytest.fixture
def recipe(tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": prompt} for prompt in TASK.prompts]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": models["prior"],
        "policies": [models["first"], models["second"]],
        "dataset_name": "prompts.jsonl",
        "reward_funcs": [{"name": "matches", "pattern": "a", "called": "has_a"}],
        "target": "constraint",
        "num_samples": 30,
        "num_reference_samples": 40,
        "diversity": False,
        "standard_error": 0.0,
        "pass_at": [1],
        "max_completion_length": TASK.max_completion_length,
        "batch_size": 16,
        "device": "cpu",
    }


def evaluate(recipe: dict[str, Any], output_dir: str, *flags: str) -> dict[str, Any]:
    """Runs the command; returns what it wrote."""
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli.main(["evaluate", "--config", "recipe.yaml", "--output_dir", output_dir, *flags])
    return json.loads(Path(output_dir, "evaluation.json").read_text())


def numbers(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every estimate of every row."""
    return [row["evaluation"]["metrics"] for row in (report["prior"], report["posterior"], *report["runs"])]


@pytest.mark.parametrize("share", [0.3, 0.95], ids=["in the prior", "in the last policy"])
def test_a_second_start_goes_on(recipe: dict[str, Any], counted: Counted, share: float) -> None:
    """It draws and scores only what is missing, and ends at the same numbers in every digit."""
    whole = evaluate(recipe, "whole")
    drawn, scored = counted.drawn, counted.scored
    counted.drawn = counted.scored = 0
    counted.limit = int(share * drawn)
    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe, "stopped")
    assert not Path("stopped", "evaluation.json").exists() and counted.drawn < drawn
    counted.limit = None
    resumed = evaluate(recipe, "stopped")
    assert (counted.drawn, counted.scored) == (drawn, scored) and drawn == PROMPTS * (40 + 30 + 30)
    assert numbers(resumed) == numbers(whole)


def test_what_is_kept_belongs_to_its_model(recipe: dict[str, Any], models: dict[str, str], counted: Counted) -> None:
    """Other weights under the same name and path are drawn and scored anew."""
    first = evaluate(recipe, "out")
    drawn = counted.drawn
    build_tiny_model(models["second"], TASK.letters, seed=9, logit_std=0.7)
    second = evaluate(recipe, "out", "--overwrite")
    assert counted.drawn == drawn + PROMPTS * 30
    assert numbers(first)[:3] == numbers(second)[:3] and numbers(first)[3] != numbers(second)[3]


def test_stops_when_there_is_enough(
    recipe: dict[str, Any], counted: Counted, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe |= {"standard_error": 0.1, "num_samples": 900, "num_reference_samples": 1000, "batch_size": 256}
    recipe["diversity"] = True
    report = evaluate(recipe, "out")
    per_prompt = report["settings"]["samples per prompt"]
    assert set(per_prompt) == {"prior", "first", "second"} and all(100 <= n < 900 for n in per_prompt.values())
    assert counted.drawn == PROMPTS * sum(per_prompt.values())
    for metrics in numbers(report)[2:]:
        for name in ("log_z", "kl_prior", "forward_kl", "reverse_kl_inside"):
            allowed = 0.1 * max(1, abs(metrics[name]["value"]))
            assert metrics[name]["trusted"] and metrics[name]["standard_error"] <= allowed, name
    printed = capsys.readouterr().out
    assert f"Stopped drawing, of each prompt: the prior after {per_prompt['prior']:,} of 1,000" in printed
    assert "at most 0.1 nats, or 10% of a larger number" in printed
    sizes = {row["evaluation"]["num_diversity_samples"] for row in (report["prior"], *report["runs"])}
    assert len(sizes) == 1 and max(sizes) <= PROMPTS * min(per_prompt.values())  # as many of each


def test_draws_all_where_there_is_never_enough(recipe: dict[str, Any], counted: Counted) -> None:
    """And of the prior at once where the target learns from it."""
    report = evaluate(recipe | {"standard_error": 1e-9}, "out")
    assert report["settings"]["samples per prompt"] == {"prior": 40, "first": 30, "second": 30}
    recipe |= {"num_samples": 120, "num_reference_samples": 110, "batch_size": 256}
    learned = recipe | {"standard_error": 9.0, "target": {"name": "moments", "mu": {"has_a": 0.8}}}
    report = evaluate(learned, "learned")
    assert report["settings"]["samples per prompt"] == {"prior": 110, "first": 100, "second": 100}
