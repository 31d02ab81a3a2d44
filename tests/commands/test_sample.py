"""`trl-bayes sample` end to end on a tiny local model: every method, SFT on what it writes, and every bad input."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from trl_bayes import cli
from trl_bayes.benchmarks.tiny import build_tiny_model, letter_count_task
from trl_bayes.command_line.sampling import SampleArguments
from trl_bayes.samplers import METHODS, Method


TASK = letter_count_task()
MODULE = "rewards_of_test_sample"
SOURCE = """
def count_a(completions, **kwargs):
    return [float(text.count("a")) for text in completions]

def has_a(completions, bonus, **kwargs):
    assert len(bonus) == len(completions)
    return [float("a" in text) for text in completions]

def words(completions, **kwargs):
    return [float(len(messages[0]["content"]) % 2) for messages in completions]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "prior": TASK.build_model(folder / "prior"),
        "policy": build_tiny_model(folder / "policy", TASK.letters, seed=5),
        "other": build_tiny_model(folder / "other", "abc"),
    }


@pytest.fixture
def recipe(tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    rows = [{"prompt": prompt, "bonus": i} for i, prompt in enumerate(TASK.prompts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield {
        "model_name_or_path": models["prior"],
        "dataset_name": "prompts.jsonl",
        "reward_funcs": [f"{MODULE}.has_a"],
        "target": "constraint",
        "num_samples": 5,
        "max_completion_length": 4,
        "output_dir": "out",
        "device": "cpu",
    }
    sys.modules.pop(MODULE, None)


def sample(recipe: dict[str, Any], *flags: str) -> dict[str, Any]:
    """Runs the command, and returns the diagnostics."""
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli.main(["sample", "--config", "recipe.yaml", *flags])
    return json.loads(Path(recipe["output_dir"], "diagnostics.json").read_text())


@pytest.fixture
def refused(recipe: dict[str, Any], refusal: Callable[..., str]) -> Callable[..., str]:
    """What the command says of changes to the recipe that it must refuse; it writes nothing."""

    def run(changes: dict[str, Any], *flags: str) -> str:
        said = refusal("sample", recipe | changes, *flags)
        assert not Path("out").exists()
        return said

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prior", {}),
        ("best_of_n", {"num_candidates": 8}),
        ("rejection", {"max_attempts": 500}),
        ("quasi_rejection", {"num_pilot": 50, "tolerance": 0.1}),
        ("mcmc", {"num_steps": 6, "num_chains": 2, "thin": 2, "kernel": "independence"}),
        ("smc", {"num_particles": 10, "upper_bound": True}),
    ],
)
def test_each_method_writes_a_data_set(
    method: str, options: dict[str, Any], recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    diagnostics = sample(recipe | options, "--method", method)
    assert diagnostics["method"] == method and diagnostics["settings"]["rewards"] == ["has_a"]
    assert diagnostics["settings"]["method"].items() >= options.items()
    rows = load_dataset("out")["train"]
    assert 0 < len(rows) == diagnostics["num_draws"] <= 20
    assert rows.column_names == ["prompt", "completion", "log_weight", "rewards", "log_potential", "ended"]
    assert set(rows["prompt"]) <= set(TASK.prompts)
    if method == "prior":
        assert len(rows) == 20 and {*rows["log_weight"]} == {0.0, float("-inf")}
    else:
        assert all("a" in text for text in rows["completion"]) and {tuple(r) for r in rows["rewards"]} == {(1.0,)}
    printed = capsys.readouterr().out
    assert f"{method}: {len(rows)} samples of 4 prompts" in printed and "out/train.parquet" in printed
    assert ("acceptance rate" in printed) == ("acceptance_rate" in diagnostics)
    assert ("what a bound B costs" in printed) == (method == "quasi_rejection")


@pytest.mark.parametrize("method", ["realigned", "proxy"])
def test_policies_whose_logits_are_mixed(method: str, recipe: dict[str, Any], models: dict[str, str]) -> None:
    """Half of the way from the prior; a policy is its own base's, or another's. What has no evidence has no weight."""
    recipe |= {"factor": 0.5, "proposal_model_name_or_path": models["policy"]}
    if method == "proxy":
        recipe |= {"proposal_base_model_name_or_path": models["prior"]}
    diagnostics = sample(recipe, "--method", method)
    assert diagnostics["settings"]["method"] == {"factor": 0.5} and diagnostics["num_draws"] == 20
    assert diagnostics["settings"]["proposal_base"] == recipe.get("proposal_base_model_name_or_path")
    rows = load_dataset("out")["train"]
    for text, weight in zip(rows["completion"], rows["log_weight"], strict=True):
        assert (weight > float("-inf")) == ("a" in text)
    assert len(set(rows["log_weight"])) > 5  # exact weights, not those of the posterior's own samples


def test_a_proposal_a_target_with_arguments_and_flags_that_beat_the_recipe(
    recipe: dict[str, Any], models: dict[str, str]
) -> None:
    recipe |= {
        "method": "mcmc",
        "num_steps": 4,
        "proposal_model_name_or_path": models["policy"],
        "reward_funcs": [f"{MODULE}.has_a", f"{MODULE}.count_a"],
        "target": {"name": "tilt", "rewards": ["count_a"]},
        "beta": 0.5,
    }
    diagnostics = sample(recipe, "--num_samples", "3", "--max_prompts", "2", "--temperature", "0.8")
    assert diagnostics["num_draws"] == 6 and diagnostics["settings"]["temperature"] == 0.8
    assert diagnostics["settings"]["proposal"] == models["policy"]
    assert diagnostics["settings"]["target"] == "Tilt(beta=0.5, rewards=['count_a'])"
    rows = load_dataset("out")["train"]
    assert rows["log_potential"] == [reward[1] / 0.5 for reward in rows["rewards"]]


def test_the_mean_reward_is_weighted(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """All samples of this posterior have an "a", so that has_a is 1."""
    recipe |= {"reward_funcs": [f"{MODULE}.has_a", f"{MODULE}.count_a"], "reward_weights": [10.0, -0.5]}
    sample(recipe | {"target": {"name": "constraint", "rewards": "has_a"}})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "mean reward" in line]
    counts = [count for _, count in load_dataset("out")["train"]["rewards"]]
    assert float(line.split("│")[2]) == pytest.approx(10 - 0.5 * sum(counts) / len(counts), rel=1e-3)


def test_a_training_recipe_is_read_as_it_is(recipe: dict[str, Any], models: dict[str, str]) -> None:
    """Its prior is sampled, which need not be the model that training starts from, and its folder is left alone."""
    training = recipe | {"model_name_or_path": models["policy"], "prior_model_name_or_path": models["prior"]}
    training |= {"output_dir": "trained", "learning_rate": 1e-4, "max_steps": 10, "divergence": "forward_kl"}
    Path("recipe.yaml").write_text(yaml.safe_dump(training))
    cli.main(["sample", "--config", "recipe.yaml", "--output_dir", "out"])
    expected = sample(recipe | {"output_dir": "alone"})
    assert load_dataset("out")["train"]["completion"] == load_dataset("alone")["train"]["completion"]
    assert expected["settings"]["prior"] == models["prior"] and not Path("trained").exists()


def sft(data: Any, model: str, **settings: Any) -> SFTTrainer:
    args = SFTConfig(
        output_dir="sft",
        max_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return SFTTrainer(model=model, args=args, train_dataset=data)


def test_sft_trains_on_it(recipe: dict[str, Any], tiny_models: Any) -> None:
    sample(recipe | {"model_name_or_path": tiny_models.prior, "target": {"name": "constraint", "threshold": -1}})
    trainer = sft(load_dataset("out", split="train"), tiny_models.prior)
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.state.log_history[-1]["train_loss"] > 0


def test_sft_on_tokens_is_the_likelihood_of_what_was_drawn(recipe: dict[str, Any], models: dict[str, str]) -> None:
    """Cut completions too, to which SFT on texts would add an EOS."""
    sample(recipe, "--tokens", "--num_samples", "10")
    rows = load_dataset("out", split="train")
    assert not all(rows["ended"])
    trainer = sft(rows, models["prior"])
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    wanted = {
        tuple(ids): tuple(token if own else -100 for token, own in zip(ids, mask, strict=True))
        for ids, mask in zip(rows["input_ids"], rows["completion_mask"], strict=True)
    }
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        own = mask.bool()
        assert wanted[tuple(ids[own].tolist())] == tuple(labels[own].tolist())
    eos = AutoTokenizer.from_pretrained(models["prior"]).eos_token_id
    assert all((ids[-1] == eos) == ended for ids, ended in zip(rows["input_ids"], rows["ended"], strict=True))


def test_a_conversation(recipe: dict[str, Any], tiny_models: Any) -> None:
    recipe |= {"model_name_or_path": tiny_models.prior, "reward_funcs": [f"{MODULE}.words"], "num_samples": 2}
    sample(recipe, "--prompt_as_message", "true", "--max_prompts", "2")
    rows = load_dataset("out", split="train")
    assert rows[0]["prompt"] == [{"role": "user", "content": TASK.prompts[0]}]
    assert [message["role"] for message in rows[0]["completion"]] == ["assistant"]
    trainer = sft(rows, tiny_models.prior)
    trainer.train()
    assert trainer.state.global_step == 1


def test_overwrite(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    sample(recipe)
    with pytest.raises(SystemExit):
        sample(recipe)
    assert "`output_dir=out` is not empty" in capsys.readouterr().err
    assert sample(recipe, "--overwrite", "--num_samples", "2")["num_draws"] == 8
    assert len(load_dataset("out", split="train")) == 8


def test_prompts_whose_evidence_is_too_rare(recipe: dict[str, Any]) -> None:
    recipe |= {"reward_funcs": [f"{MODULE}.count_a"], "target": {"name": "constraint", "threshold": 4}}
    diagnostics = sample(recipe, "--max_attempts", "30", "--num_samples", "3")
    assert 0 < diagnostics["num_missing"] == 12 - diagnostics["num_draws"]


def test_an_error_in_a_reward_keeps_its_traceback(recipe: dict[str, Any]) -> None:
    Path(f"{MODULE}.py").write_text("def has_a(completions, **kwargs):\n    raise ValueError('from the reward')\n")
    with pytest.raises(ValueError, match="from the reward"):
        sample(recipe)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sample", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "SampleArguments (trl_bayes):" in printed and "{prior,best_of_n,rejection," in printed
    assert printed.index("--num_particles") < printed.index("ModelConfig (trl):")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_setting_of_a_method_is_a_flag(method: type[Method]) -> None:
    """Without a default, so that what is not given is the method's own."""
    defaults = {setting.name: setting.default for setting in fields(cast(Any, method))}
    assert SampleArguments(method=method.name).make_method() == method()
    assert all(SampleArguments.__dataclass_fields__[name].default is None for name in defaults)
    if defaults:
        name, value = next((name, value) for name, value in defaults.items() if value not in (None, False))
        assert getattr(SampleArguments(method=method.name, **{name: value}).make_method(), name) == value


def test_the_flags_of_methods_say_whose_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "MethodOptions (trl_bayes):" in printed
    assert "rejection, smc: the largest phi of any completion; a constraint's is known to be 0" in printed
    assert "quasi_rejection: total variation allowed where B is chosen (0.02)" in printed


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "`num_samples` must be at least 1, got 0."),
        ({"max_prompts": 0}, "`max_prompts` must be at least 1, got 0."),
        ({"method": "rejektion"}, "(did you mean 'rejection'?)"),
        ({"num_sample": 3}, "Unknown key `num_sample` in recipe.yaml (did you mean 'num_samples'?)"),
        ({"target": "tilt"}, "set `max_log_potential`"),
        ({"target": "tillt"}, "Unknown target 'tillt'"),
        ({"target": {"name": "constraint", "rewards": ["has_b"]}}, "reads the reward 'has_b'"),
        ({"num_particles": 4}, "`num_particles` is not for the method 'rejection'"),
        ({"method": "smc", "num_particles": 0}, "`num_particles` must be at least 1"),
        ({"method": "mcmc", "kernel": "gibbs"}, "`kernel` is one of ['prefix', 'independence']"),
        ({"model_name_or_path": ...}, "`model_name_or_path` is missing"),
        ({"model_name_or_path": "nope/nope"}, "the model 'nope/nope' cannot be loaded"),
        ({"method": "mcmc", "proposal_model_name_or_path": "nope/nope"}, "`proposal_model_name_or_path`: the model"),
        ({"dataset_name": ...}, "`dataset_name` is missing"),
        ({"dataset_name": "nope.jsonl"}, "The data set 'nope.jsonl' cannot be loaded"),
        ({"dataset_train_split": "test"}, "no split 'test'"),
        ({"dataset_streaming": True}, "set `max_prompts`"),
        ({"reward_funcs": ["nope"]}, "There is no reward 'nope'"),
        ({"reward_funcs": ["some/model"]}, "`reward_funcs`: the model 'some/model' cannot be loaded"),
        ({"reward_funcs": ...}, "give at least one reward function"),
        ({"reward_weights": [1, 2]}, "2 reward weights for 1 reward functions"),
        ({"temperature": 0}, "`temperature=0.0` does not sample"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"device": "tpu9"}, "`device=tpu9` cannot be used"),
        (
            {"target": {"name": "constraint", "threshold": 9}, "max_attempts": 2},
            "The method 'rejection' found no sample in 40 completions",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], message: str, refused: Callable[..., str]) -> None:
    assert message in refused(changes)


def test_proposals_that_cannot_be_used(refused: Callable[..., str], models: dict[str, str]) -> None:
    assert "there is no policy: set `proposal_model_name_or_path`" in refused({"method": "realigned"})
    policy = {"proposal_model_name_or_path": models["policy"]}
    assert "set `proposal_base_model_name_or_path`" in refused({"method": "proxy", **policy})
    assert "leave `proposal_base_model_name_or_path` out" in refused(
        {"method": "mcmc", **policy, "proposal_base_model_name_or_path": models["prior"]}
    )
    missing = {"method": "proxy", **policy, "proposal_base_model_name_or_path": "nope/nope"}
    assert "`proposal_base_model_name_or_path`: the model" in refused(missing)
    assert "draws from the prior" in refused({"proposal_model_name_or_path": models["policy"]})
    message = refused({"proposal_model_name_or_path": models["other"], "method": "mcmc"})
    assert message.startswith("The tokenizer of the proposal has another vocabulary than the prior's")


def test_an_output_folder_that_is_a_file(refused: Callable[..., str]) -> None:
    Path("file").write_text("")
    assert "`output_dir=file` cannot be written to" in refused({"output_dir": "file"})
    assert "is not JSON" in refused({}, "--target", "{name")
    assert "is for training in several processes" in refused({}, "--accelerate_config", "cpu_ddp")
