"""`trl-bayes evaluate` end to end on tiny models whose distances are known, its report, and every bad input."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes import cli
from trl_bayes.benchmarks.tiny import balance_task, build_tiny_model
from trl_bayes.command_line.evaluation import name_policies
from trl_bayes.evaluation.files import read_report
from trl_bayes.evaluation.report import Report
from trl_bayes.statistics.estimate import Estimate


TASK = balance_task()
BETA = 0.6
ALL = ("--standard_error", "0")  # draws all samples
MODULE = "rewards_of_test_evaluate"
SOURCE = """
def balance(completions, **kwargs):
    from trl_bayes.benchmarks.tiny import balance_task
    return balance_task().reward(completions)

def has_a(completions, bonus, **kwargs):
    assert len(bonus) == len(completions)
    return [float("a" in text) for text in completions]

def rare(completions, **kwargs):
    return [float(text == "c c c a b a") for text in completions]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made = {
        "prior": TASK.build_model(folder / "prior"),
        "policy": build_tiny_model(folder / "policy", TASK.letters, seed=5, logit_std=0.7),
        "other": build_tiny_model(folder / "other", "abcd"),
    }
    base = AutoModelForCausalLM.from_pretrained(made["prior"])
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(folder / "adapter")
    return made | {"adapter": str(folder / "adapter")}


@pytest.fixture
def recipe(tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    rows = [{"prompt": prompt, "bonus": i} for i, prompt in enumerate(TASK.prompts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "200")
    yield {
        "model_name_or_path": models["prior"],
        "policies": [models["policy"]],
        "dataset_name": "prompts.jsonl",
        "reward_funcs": [f"{MODULE}.balance"],
        "beta": BETA,
        "num_samples": 200,
        "num_reference_samples": 400,
        "max_completion_length": TASK.max_completion_length,
        "output_dir": "out",
        "device": "cpu",
    }
    sys.modules.pop(MODULE, None)


def evaluate(recipe: dict[str, Any], *flags: str) -> Report:
    """Runs the command, and returns what it wrote."""
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli.main(["evaluate", "--config", "recipe.yaml", *flags])
    text = Path(recipe["output_dir"], "evaluation.json").read_text()
    return Report.from_dict(json.loads(text, parse_constant=pytest.fail))


def metrics(report: Report, name: str) -> dict[str, Estimate]:
    (row,) = [row for row in report.rows if row.name == name]
    assert row.evaluation is not None
    return row.evaluation.metrics


@pytest.fixture
def refused(recipe: dict[str, Any], refusal: Callable[..., str]) -> Callable[..., str]:
    """What the command says of changes to the recipe that it must refuse; it writes nothing."""

    def run(changes: dict[str, Any], *flags: str) -> str:
        said = refusal("evaluate", recipe | changes, *flags)
        assert not Path("out", "evaluation.json").exists()
        return said

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("bound", [0.5 / BETA, None], ids=["rejection", "importance"])
def test_estimates_are_those_of_the_task(
    bound: float | None, recipe: dict[str, Any], models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """3.9 standard errors: a correct estimate fails once in 10,000 for each of ten numbers."""
    report = evaluate(recipe | {"max_log_potential": bound, "num_samples": 600, "num_reference_samples": 1500}, *ALL)
    prior, policy = (AutoModelForCausalLM.from_pretrained(models[name]) for name in ("prior", "policy"))
    tokenizer = AutoTokenizer.from_pretrained(models["prior"])
    exact = TASK.evaluate(policy, tokenizer, prior, lambda rewards: rewards / BETA)
    posteriors = TASK.posteriors(tokenizer, prior, lambda rewards: rewards / BETA)
    found = metrics(report, "policy")
    for name in ("forward_kl", "reverse_kl", "total_variation", "kl_prior", "entropy"):
        estimate = found[name]
        assert estimate.trusted and abs(estimate.value - getattr(exact, name)) < 3.9 * estimate.standard_error, name
        assert ("by importance sampling" in estimate.note) == (
            bound is None and name in ("forward_kl", "total_variation")
        )
    log_z = sum(posterior.log_z for posterior in posteriors) / len(posteriors)
    assert abs(found["log_z"].value - log_z) < 3.9 * found["log_z"].standard_error
    own = metrics(report, "posterior")
    entropy = -sum((p.log_posterior.exp() * p.log_posterior).sum().item() for p in posteriors) / len(posteriors)
    assert abs(own["entropy"].value - entropy) < 3.9 * own["entropy"].standard_error
    assert "pass_at_1" not in found  # the reward is not 0 or 1
    printed = capsys.readouterr().out
    for text in (
        "log Z",
        "KL(p‖π)",
        "KL(π‖p)",
        "KL(π‖π₀)",
        "TV(π, p)",
        "entropy",
        "self-BLEU",
        "distinct-2",
        "policy",
    ):
        assert text in printed
    assert ("by importance sampling; the prompt with the fewest" in printed) == (bound is None)
    assert report.settings["posterior"] == ("exact" if bound else "weighted prior samples")


def test_several_policies_a_constraint_and_pass_at_k(recipe: dict[str, Any], models: dict[str, str]) -> None:
    recipe |= {"target": "constraint", "reward_funcs": [f"{MODULE}.has_a"], "pass_at": [4, 1, 500]}
    recipe["policies"] = [f"trained={models['policy']}", f"again={models['prior']}", f"lora={models['adapter']}"]
    report = evaluate(recipe)
    assert [row.name for row in report.rows] == ["posterior", "prior", "trained", "again", "lora"]
    assert report.hard and report.reward_is_share
    same, lora = metrics(report, "again"), metrics(report, "lora")
    prior = metrics(report, "prior")
    assert abs(prior["forward_kl"].value + prior["log_z"].value) < 1e-6  # the prior's is -log Z
    # The samples of its copy know the evidence's probability, too
    assert abs(same["forward_kl"].value + same["log_z"].value) < 2 * same["log_z"].standard_error
    assert same["forward_kl"].standard_error < same["log_z"].standard_error
    assert same["kl_prior"].value == 0 and lora["kl_prior"].value > 0.001  # the adapter is on
    assert same["reverse_kl"].value == math.inf and same["mass_outside"].value > 0
    assert same["pass_at_1"].value == pytest.approx(same["reward"].value)
    assert same["pass_at_4"].value > same["pass_at_1"].value and not same["pass_at_500"].trusted
    assert metrics(report, "posterior")["pass_at_1"].value == 1
    lines = report.runs[0].samples
    assert {line.valid for line in lines} == {True, False}
    assert all(line.valid == ("a" in line.completion) for line in lines)


def test_a_rare_event_is_not_printed_as_a_number(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate(recipe | {"target": "constraint", "reward_funcs": [f"{MODULE}.rare"]}, "--diversity", "false")
    for name in ("log_z", "forward_kl", "total_variation"):
        estimate = metrics(report, "policy")[name]
        assert not estimate.trusted and estimate.note
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "log Z" in line]
    assert line.count("not reliable") == 3
    assert re.search(
        r"samples of the posterior for some prompt \(. of 4 have fewer than 30\): raise `--num_ref", printed
    )
    assert "distinct_2" not in metrics(report, "policy") and "self-BLEU" not in printed


def test_a_posterior_with_few_samples_does_not_limit_the_others(recipe: dict[str, Any]) -> None:
    report = evaluate(recipe | {"target": "constraint", "reward_funcs": [f"{MODULE}.rare"], "num_samples": 60})
    sizes = {row.name: row.evaluation.num_diversity_samples for row in report.rows if row.evaluation is not None}
    assert sizes["policy"] == sizes["prior"] == 60 * len(TASK.prompts) > sizes["posterior"]
    assert metrics(report, "policy")["distinct_2"].trusted
    assert "too few samples to compare its diversity" in metrics(report, "posterior")["distinct_2"].note


def test_several_rewards_and_a_target_that_learns(recipe: dict[str, Any]) -> None:
    recipe |= {
        "reward_funcs": [f"{MODULE}.has_a", f"{MODULE}.balance"],
        "target": {"name": "moments", "mu": {"has_a": 0.8}},
    }
    report = evaluate(recipe, "--max_prompts", "2")
    assert "reward/has_a" in metrics(report, "policy") and "pass_at_1/has_a" in metrics(report, "policy")
    assert metrics(report, "posterior")["reward/has_a"].value == pytest.approx(0.8, abs=0.05)
    assert report.problem["prompts"] == "the first 2 of 4" and report.reward_label == "sum of rewards"


@pytest.mark.parametrize("target", [{"name": "tilt", "beta": 1.0}, {"name": "constraint", "rewards": "has_a"}])
def test_the_reward_is_weighted_as_in_training(recipe: dict[str, Any], target: dict[str, Any]) -> None:
    """For posteriors by importance sampling and by rejection; each reward alone is as its function returns it."""
    recipe |= {"reward_funcs": [f"{MODULE}.has_a", f"{MODULE}.balance"], "target": target}
    report = evaluate(recipe | {"reward_weights": [1.0, -0.5]})
    assert report.reward_label == "weighted sum of rewards" and not report.reward_is_share
    for row in ("posterior", "prior", "policy"):
        of_row = metrics(report, row)
        has_a, balance = of_row["reward/has_a"].value, of_row["reward/balance"].value
        assert of_row["reward"].value == pytest.approx(has_a - 0.5 * balance) and abs(balance) > 0.05


def test_the_prior_may_be_another_than_the_model_that_training_starts_from(
    recipe: dict[str, Any], models: dict[str, str]
) -> None:
    recipe |= {"model_name_or_path": models["policy"], "prior_model_name_or_path": models["prior"]}
    report = evaluate(recipe)
    assert metrics(report, "policy")["kl_prior"].value > 0.05 and report.problem["prior"] == models["prior"]


def test_a_training_recipe_is_read_as_it_is(recipe: dict[str, Any]) -> None:
    """Its own folder is not written to, nor is `overwrite` in it meant for this command."""
    training = {key: value for key, value in recipe.items() if not key.startswith("num_") and key != "policies"}
    training |= {"learning_rate": 1e-4, "num_generations": 8, "bf16": False, "divergence": "alpha", "alpha": 0.5}
    training |= {"num_processes": 8, "accelerate_config": "zero3", "num_prior_samples": 3, "output_dir": "trained"}
    training["overwrite"] = True
    Path("recipe.yaml").write_text(yaml.safe_dump(training))
    flags = ["--policies", recipe["policies"][0], "--num_samples", "40", "--num_reference_samples", "50"]
    cli.main(["evaluate", "--config", "recipe.yaml", *flags])
    assert read_report("runs/evaluation").runs[0].name == "policy" and not Path("trained").exists()
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--config", "recipe.yaml", *flags])


def test_a_report_of_evaluations(recipe: dict[str, Any], models: dict[str, str]) -> None:
    evaluate(recipe)
    evaluate(recipe | {"output_dir": "two", "policies": [f"second={models['adapter']}"]})
    cli.main(["report", "out", "two/evaluation.json", "--output_dir", "page"])
    merged = read_report("page")
    assert [run.label for run in merged.runs] == ["policy (out)", "second (two/evaluation.json)"]
    page = Path("page", "report.html").read_text()
    assert "second (two/evaluation.json)" in page and "log Z" in page


def test_the_penalty_of_an_xpo_recipe_is_part_of_the_posterior(recipe: dict[str, Any]) -> None:
    """As in training: one more reward, of completions that are cut."""
    changes = {"missing_eos_penalty": 3.0, "num_samples": 8, "num_reference_samples": 40, "max_completion_length": 2}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
    cli.main(["evaluate", "--config", "recipe.yaml", "--save_samples", "--output_dir", "out"])
    assert read_report("out").problem["rewards"] == "balance, missing_eos"
    lines = [json.loads(line) for line in Path("out/samples/policy.jsonl").read_text().splitlines()]
    assert {line["rewards"][1] for line in lines} <= {0.0, -3.0}
    assert any(line["rewards"][1] == -3.0 for line in lines)


def test_names_of_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b").mkdir()
    assert name_policies(["x/run", "best=y/run", "a=b"]) == {"run": "x/run", "best": "y/run", "a=b": "a=b"}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 1}, "`num_samples` must be at least 2, got 1."),
        ({"standard_error": -1}, "`standard_error` must be 0 or a positive finite number, got -1."),
        ({"num_reference_samples": 1}, "`num_reference_samples` must be at least 2, got 1."),
        ({"pass_at": [1, 0]}, "`pass_at` must be at least 1, got 0."),
        ({"max_log_potential": math.inf}, "`max_log_potential` must be finite"),
        ({"policies": ...}, "`policies` is missing"),
        ({"policies": ["x="]}, "'x=' is neither PATH nor NAME=PATH"),
        ({"policies": ["a/x", "b/x"]}, "Two policies are called 'x'"),
        ({"policies": ["org/sft=a"]}, "The policy's name 'org/sft' is to be part of a file's"),
        ({"max_completion_length": None}, "`max_completion_length=None` is no length"),
        ({"policies": ["prior=a"]}, "No policy can be called 'prior'"),
        ({"policies": ["nope/nope"]}, "`policies`: the model 'nope/nope' cannot be loaded"),
        ({"policies": ["nope"]}, "`policies`: the model 'nope' cannot be loaded"),
        ({"method": "rejection"}, "`method=rejection` needs evidence with a known upper bound"),
        ({"method": "exact"}, "must be one of"),
        ({"max_log_potential": -5.0}, "above `max_log_potential=-5`"),
        ({"model_name_or_path": ...}, "`model_name_or_path` is missing"),
        ({"prior_model_name_or_path": "nope/nope"}, "`prior_model_name_or_path`: the model 'nope/nope'"),
        ({"num_sample": 3}, "Unknown key `num_sample` in recipe.yaml (did you mean 'num_samples'?)"),
        ({"learning_rate": 1e-4, "num_sample": 3}, "Unknown key `num_sample` in recipe.yaml"),
        ({"generation_kwargs": {"typical_p": 0.9}}, "`typical_p=0.9` in `generation_kwargs` changes the distribution"),
        ({"generation_kwargs": {"max_time": 1}}, "`max_time=1` in `generation_kwargs` changes the distribution"),
        ({"top_p": 0.9}, "`top_p=0.9` changes the distribution"),
        ({"beta": 0}, "`beta=0` is pure RL, which has no posterior"),
        ({"temperature": 0}, "`temperature=0.0` does not sample"),
        ({"reward_funcs": ...}, "give at least one reward function"),
        ({"reward_funcs": ["some/model"]}, "`reward_funcs`: the model 'some/model' cannot be loaded"),
        ({"reward_weights": [1, 2]}, "2 reward weights for 1 reward functions"),
        ({"dataset_name": "nope.jsonl"}, "The data set 'nope.jsonl' cannot be loaded"),
        ({"device": "tpu9"}, "`device=tpu9` cannot be used"),
        ({"output_dir": "prompts.jsonl"}, "`output_dir=prompts.jsonl` cannot be written to"),
        ({"inference_procedure": "best_of_n", "kl_budget": 9}, "`kl_budget=9.0` must lie in (0, 5] nats"),
        ({"target": {"name": "moments", "mu": {"balance": 7}}}, "balance"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], message: str, refused: Callable[..., str]) -> None:
    if "max_log_potential" not in changes and "device" not in changes:
        changes = {"num_reference_samples": 50} | changes
    assert message in refused(changes)


def test_policies_that_cannot_be_used(refused: Callable[..., str], models: dict[str, str], tmp_path: Path) -> None:
    message = refused({"policies": [models["other"]]})
    assert message.startswith("The tokenizer of the policy 'other' has another vocabulary than the prior's")
    AutoModelForCausalLM.from_pretrained(models["other"]).save_pretrained(tmp_path / "bare")
    assert "a vocabulary of 5 tokens, the prior one of 4" in refused({"policies": [str(tmp_path / "bare")]})
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "adapter_config.json").write_text('{"base_model_name_or_path": "gone/away"}')
    assert "the base model 'gone/away' of the adapter" in refused({"policies": [str(tmp_path / "lost")]})
    assert "is for training in several processes" in refused({}, "--num_processes", "2")


def test_results_are_not_written_over(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    recipe |= {"num_samples": 40, "num_reference_samples": 40}
    evaluate(recipe)
    with pytest.raises(SystemExit):
        evaluate(recipe)
    assert "`output_dir=out` is not empty" in capsys.readouterr().err
    evaluate(recipe, "--overwrite")


def test_an_error_in_a_reward_keeps_its_traceback(recipe: dict[str, Any]) -> None:
    Path(f"{MODULE}.py").write_text("def balance(completions, **kwargs):\n    raise ValueError('from the reward')\n")
    with pytest.raises(ValueError, match="from the reward"):
        evaluate(recipe)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", "--help"])
    assert stopped.value.code == 0
    assert "EvaluateArguments (trl_bayes):" in capsys.readouterr().out
