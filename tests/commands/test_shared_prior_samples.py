"""Training, `evaluate` and `sample` draw samples of the prior once: each finds what another has kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_bayes import cli
from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.prior import drawing
from trl_bayes.trainers.posterior_trainer import PosteriorTrainer


TASK = letter_count_task()
OF_POLICIES = (1, 8)  # the seeds that policies are drawn with: one more than the recipe's


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> str:
    return TASK.build_model(tmp_path_factory.mktemp("prior"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many completions of the prior each of the two ways to draw them has drawn."""
    numbers = {"trainer": 0, "model": 0}
    generate, draw = drawing.generate, PosteriorTrainer._draw_prior

    def by_model(model: Any, rows: Any, settings: Any) -> Any:
        numbers["model"] += len(rows) if settings.seed not in OF_POLICIES else 0
        return generate(model, rows, settings)

    def by_trainer(self: PosteriorTrainer, rows: Any, seed: int) -> Any:
        numbers["trainer"] += len(rows)
        return draw(self, rows, seed)

    monkeypatch.setattr(drawing, "generate", by_model)
    monkeypatch.setattr(PosteriorTrainer, "_draw_prior", by_trainer)
    return numbers


@pytest.fixture
def recipe(prior: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of a training, as `evaluate` and `sample` read it too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    rows = [{"prompt": prompt, "answer": i} for i, prompt in enumerate(TASK.prompts)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": prior,
        "dataset_name": "prompts.jsonl",
        "reward_funcs": [{"name": "length_in", "unit": "characters"}],
        "target": {"name": "calibrated", "transform": "best_of_n", "n": 2},
        "max_completion_length": TASK.max_completion_length,
        "num_prior_samples": 20,
        "output_dir": "trained",
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }


def run(command: str, recipe: dict[str, Any], *flags: str) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli.main([command, "--config", "recipe.yaml", *flags])


def evaluate(recipe: dict[str, Any], prior: str, *flags: str) -> None:
    run("evaluate", recipe, "--policies", f"same={prior}", "--num_samples", "8", "--device", "cpu", *flags)


def sample(recipe: dict[str, Any], *flags: str) -> None:
    run("sample", recipe, "--method", "quasi_rejection", "--num_samples", "2", "--device", "cpu", *flags)


def test_evaluate_and_sample_find_what_a_training_has_kept(
    recipe: dict[str, Any], prior: str, drawn: dict[str, int]
) -> None:
    """By its recipe alone; what is asked for beyond it is drawn and added, for a later training too."""
    run("f-dpg", recipe)
    assert drawn == {"trainer": 80, "model": 0}
    evaluate(recipe, prior, "--num_reference_samples", "20", "--output_dir", "first")
    sample(recipe, "--num_prior_samples", "20", "--output_dir", "second")
    assert drawn == {"trainer": 80, "model": 0}
    evaluate(recipe, prior, "--num_reference_samples", "32", "--output_dir", "third")
    assert drawn == {"trainer": 80, "model": 48}
    more = {"num_prior_samples": 32, "output_dir": "again", "prior_samples_dir": "trained/prior_samples"}
    run("f-dpg", recipe | more)
    assert drawn == {"trainer": 80, "model": 48}


def test_a_training_finds_what_evaluate_has_kept(recipe: dict[str, Any], prior: str, drawn: dict[str, int]) -> None:
    recipe = recipe | {"prior_samples_dir": "kept"}
    evaluate(recipe, prior, "--num_reference_samples", "20", "--output_dir", "first")
    assert drawn == {"trainer": 0, "model": 80}
    run("f-dpg", recipe)
    assert drawn == {"trainer": 0, "model": 80}


@pytest.mark.parametrize(
    "other", [{"seed": 7}, {"temperature": 0.5}, {"max_completion_length": 3}], ids=lambda each: next(iter(each))
)
def test_samples_of_something_else_are_not_used(
    other: dict[str, Any], recipe: dict[str, Any], prior: str, drawn: dict[str, int]
) -> None:
    run("f-dpg", recipe)
    evaluate(recipe | other, prior, "--num_reference_samples", "20", "--output_dir", "first")
    assert drawn == {"trainer": 80, "model": 80}


def test_other_rewards_are_asked_again(recipe: dict[str, Any], prior: str, drawn: dict[str, int]) -> None:
    """The same completions: the mean length in tokens of the prior, and not in characters as training kept it."""
    run("f-dpg", recipe)
    rewards = {"reward_funcs": [{"name": "length_in", "unit": "tokens", "called": "length_in_characters"}]}
    means = []
    for changes in ({}, rewards):
        evaluate(recipe | changes, prior, "--num_reference_samples", "20", "--output_dir", "eval", "--overwrite")
        rows = json.loads(Path("eval/evaluation.json").read_text())["prior"]["evaluation"]["metrics"]
        means.append(rows["reward"]["value"])
    assert drawn == {"trainer": 80, "model": 0}
    assert means[1] <= TASK.max_completion_length < means[0]


def test_nothing_is_kept_elsewhere_where_nobody_asks_for_it(
    recipe: dict[str, Any], prior: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the output folder all is, for another evaluation there: of one more policy, say."""
    before = {path.name for path in Path(".").iterdir()}
    evaluate(recipe, prior, "--num_reference_samples", "20", "--output_dir", "first")
    assert {path.name for path in Path(".").iterdir()} - before == {"recipe.yaml", "first"}
    assert all(file.is_relative_to("first/kept") for file in Path("first").rglob("*.parquet"))
    monkeypatch.setattr(drawing, "generate", pytest.fail)
    evaluate(recipe, prior, "--num_reference_samples", "20", "--output_dir", "first", "--overwrite")


def test_samples_that_cannot_be_used_are_one_sentence(
    recipe: dict[str, Any], prior: str, refusal: Callable[..., str]
) -> None:
    run("f-dpg", recipe)
    next(Path("trained").rglob("samples-*.parquet")).write_bytes(b"not a table")
    flags = ("--device", "cpu", "--output_dir", "first")
    assert "delete it, and it is made again" in refusal("evaluate", recipe, "--policies", f"same={prior}", *flags)
    said = refusal("sample", recipe, "--method", "quasi_rejection", "--overwrite", *flags)
    assert "delete it, and it is made again" in said
