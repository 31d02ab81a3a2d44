"""What trains is evaluated and sampled by the same recipe: the same models, loaded in the same way, and folders."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from trl import DatasetMixtureConfig, ModelConfig

from tests.helpers.one_recipe import MCMC, MODULE, Seen, evaluated, recipe_in, sample_settings
from tests.helpers.training import lora
from trl_bayes import KLRLConfig
from trl_bayes.command_line.arguments import Arguments, TrainingScriptArguments
from trl_bayes.command_line.rewards import check_reward_models
from trl_bayes.evaluation.files import read_report
from trl_bayes.language_models.adapters import base_of_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_models: Any) -> str:
    """An adapter that is far from its base model, without a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=16)
        get_peft_model(base, config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(tmp_path: Path, tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    with recipe_in(tmp_path, tiny_models.policy, monkeypatch) as made:
        yield made


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Folders and quantizations of the models that are loaded; without bitsandbytes they are loaded as they are."""
    seen: list[tuple[str, Any]] = []
    original = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type, name: str, *args: Any, **kwargs: Any) -> Any:
        seen.append((str(name), kwargs.pop("quantization_config", None)))
        kwargs.pop("device_map", None)
        return original(cls, name, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    return seen


@pytest.mark.parametrize(
    "quantization",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True, "dtype": "bfloat16"},
        {"load_in_8bit": True},
        {},
    ],
)
def test_quantization_reaches_every_model_that_training_quantizes(
    quantization: dict[str, Any], recipe: dict[str, Any], loaded: list[tuple[str, Any]], tiny_models: Any
) -> None:
    seen = Seen(recipe | quantization | {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]})
    seen.train()
    configs = [None if config is None else config.to_dict() for _, config in loaded]
    assert configs and all(config == configs[0] for config in configs)
    assert (configs[0] is not None) == bool(quantization)
    for name, value in quantization.items():
        if name.startswith("load"):
            assert configs[0][name] == value
    for run in (seen.evaluate, lambda: seen.sample(*MCMC, "--proposal_model_name_or_path", "trained")):
        loaded.clear()
        run()
        assert [None if config is None else config.to_dict() for _, config in loaded] == [configs[0]] * 2


def test_a_prior_of_its_own_is_loaded_as_in_training(
    recipe: dict[str, Any], loaded: list[tuple[str, Any]], tiny_models: Any
) -> None:
    """It is not quantized, and the policy's revision is not its own."""
    prior = {"prior_model_name_or_path": tiny_models.prior, "load_in_8bit": True, "model_revision": "main"}
    seen = Seen(recipe | prior)
    seen.train()
    assert {(name, config is None) for name, config in loaded} == {
        (tiny_models.policy, False),
        (tiny_models.prior, True),
    }
    loaded.clear()
    seen.evaluate(tiny_models.policy)
    assert {(name, config is None) for name, config in loaded} == {
        (tiny_models.policy, False),
        (tiny_models.prior, True),
    }


def test_without_bitsandbytes_all_commands_say_the_same(recipe: dict[str, Any], refusal: Callable[..., str]) -> None:
    recipe |= {"load_in_4bit": True}
    said = {
        refusal("kl-rl", recipe),
        refusal("evaluate", recipe | {"policies": [recipe["model_name_or_path"]]}),
        refusal("sample", recipe | {"method": "prior"}),
    }
    assert len(said) == 1 and "bitsandbytes" in said.pop()


def test_home_in_every_path(recipe: dict[str, Any], tiny_models: Any) -> None:
    """Folders below `~` are those of the user, and none is made that is called `~`."""
    home = Path("home").absolute()
    home.mkdir()
    for name, folder in (("model", tiny_models.policy), ("prior", tiny_models.prior)):
        (home / name).symlink_to(folder)
    Path("prompts.jsonl").rename(home / "prompts.jsonl")
    recipe |= {"model_name_or_path": "~/model", "prior_model_name_or_path": "~/prior"}
    recipe |= {"dataset_name": "~/prompts.jsonl", "output_dir": "~/runs/trained", "prior_samples_dir": "~/kept"}
    seen = Seen(recipe)
    seen.train()
    assert (home / "runs" / "trained" / "model.safetensors").is_file()
    seen.evaluate("again=~/runs/trained", "--output_dir", "~/runs/evaluation")
    assert [run.name for run in read_report(home / "runs" / "evaluation").runs] == ["again"]
    seen.sample("--output_dir=~/runs/sample", "--proposal_model_name_or_path=~/runs/trained", *MCMC)
    assert (home / "runs" / "sample" / "train.parquet").is_file()
    assert not Path("~").exists()


def test_an_adapter_as_the_model(recipe: dict[str, Any], adapter: str, tiny_models: Any) -> None:
    """Training goes on from it and keeps it as the prior; evaluation and sampling take it for the prior too."""
    seen = Seen(recipe | {"model_name_or_path": adapter, "learning_rate": 0.0, "num_generations": 8})
    seen.train()
    assert seen.logged()["posterior/kl_prior"] == pytest.approx(0, abs=1e-4)
    assert Path("trained/adapter_model.safetensors").is_file()
    policies = {"same": adapter, "trained": "trained", "base": tiny_models.policy}
    for name, policy in policies.items():
        seen.evaluate(f"{name}={policy}", "--overwrite")
        policies[name] = evaluated(name)["kl_prior"].value
    assert policies["same"] == pytest.approx(0, abs=1e-4) == policies["trained"]  # nothing was learned
    assert policies["base"] > 0.1  # the adapter is on
    seen.sample()


def test_kept_samples_of_an_adapter_are_not_those_of_its_base(recipe: dict[str, Any], adapter: str) -> None:
    """Both have the base model's name; evaluation finds what training with the adapter has kept, and only that."""
    kept = {"prior_samples_dir": "kept", "partition": "prior_samples", "num_prior_samples": 8}
    log_z: dict[str, list[Any]] = {"adapter": [], "base": []}
    for name, model in (("adapter", adapter), ("base", recipe["model_name_or_path"])):
        seen = Seen(recipe | kept | {"model_name_or_path": model, "output_dir": f"trained_{name}"})
        seen.train()
        for run in ("with", "without"):
            more = [] if run == "with" else ["--prior_samples_dir", "elsewhere"]
            all_samples = ["--num_reference_samples", "400", "--standard_error", "0"]
            seen.evaluate(model, "--output_dir", f"{name}_{run}", "--seed", "42", *all_samples, *more)
            log_z[name].append(read_report(f"{name}_{run}").settings["log Z"])
    for name in log_z:
        kept_z, fresh_z = log_z[name]
        error = (kept_z["standard_error"] ** 2 + fresh_z["standard_error"] ** 2) ** 0.5
        assert abs(kept_z["value"] - fresh_z["value"]) < 3.9 * error
    assert abs(log_z["adapter"][0]["value"] - log_z["base"][0]["value"]) > 5 * log_z["base"][0]["standard_error"]


def test_an_adapter_is_trained(recipe: dict[str, Any], adapter: str) -> None:
    Seen(recipe | {"model_name_or_path": adapter, "learning_rate": 1e-2}).train()
    base = AutoModelForCausalLM.from_pretrained(recipe["model_name_or_path"])
    before, after = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.config._name_or_path), folder).state_dict()
        for folder in (adapter, "trained")
    )
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed and all("lora" in name for name in changed)


def test_an_adapter_as_the_prior(recipe: dict[str, Any], adapter: str, tiny_models: Any) -> None:
    """The policy starts at the base model, so it is away from the prior by what the adapter does."""
    recipe |= {"prior_model_name_or_path": adapter, "learning_rate": 0.0, "per_device_train_batch_size": 64}
    seen = Seen(recipe | {"num_generations": 32})
    seen.train()
    seen.evaluate(tiny_models.policy, "--num_samples", "400")
    estimate = evaluated(Path(tiny_models.policy).name)["kl_prior"]
    assert estimate.value > 0.1
    standard_error = estimate.standard_error * (800 / 64) ** 0.5  # of as few samples as training has
    assert abs(seen.logged()["posterior/kl_prior"] - estimate.value) < 3.9 * standard_error


def test_two_adapters_at_once_are_refused(recipe: dict[str, Any], adapter: str, refusal: Callable[..., str]) -> None:
    message = refusal("kl-rl", recipe | {"model_name_or_path": adapter, "use_peft": True})
    assert "`PeftModel` instance together with a `peft_config`" in message


# ---------------------------------------------------------------------------------------------------------------------
# Reward models


def test_a_reward_model(recipe: dict[str, Any], tiny_models: Any, loaded: list[tuple[str, Any]]) -> None:
    """It is loaded as in training, and a target reads it by the same name."""
    target = {"name": "tilt", "beta": 1.0, "rewards": ["reward"]}
    recipe |= {"reward_funcs": [f"{MODULE}.length", tiny_models.reward], "target": target}
    seen = Seen(recipe | {"load_in_8bit": True, "use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]})
    seen.train()
    assert (tiny_models.reward, None) in loaded and "rewards/reward/mean" in seen.logged()
    for run in (seen.evaluate, seen.sample):
        loaded.clear()
        run()
        assert (tiny_models.reward, None) in loaded
    assert read_report("runs/evaluation").problem["rewards"] == "length, reward"
    assert sample_settings()["rewards"] == ["length", "reward"]


def test_kept_samples_are_scored_by_a_reward_model(recipe: dict[str, Any], tiny_models: Any) -> None:
    """What a training has kept is used by the same model's name and rewards."""
    recipe |= {"reward_funcs": [tiny_models.reward], "partition": "prior_samples", "num_prior_samples": 8}
    seen = Seen(recipe)
    seen.train()
    assert Path("trained/prior_samples").is_dir()
    seen.evaluate()
    seen.evaluate("trained", "--output_dir", "again")
    first, again = (read_report(folder).settings["log Z"] for folder in ("runs/evaluation", "again"))
    assert first == again


def test_a_reward_model_of_a_revision_that_is_not_there(recipe: dict[str, Any], refusal: Callable[..., str]) -> None:
    """All commands look for it where TRL does."""
    recipe |= {"reward_model_name_or_path": "nope/nope", "method": "prior"}
    said = {
        refusal("kl-rl", {key: value for key, value in recipe.items() if key != "method"}),
        refusal("evaluate", recipe | {"policies": [recipe["model_name_or_path"]], "method": "auto"}),
        refusal("sample", recipe),
    }
    assert len(said) == 1 and said.pop().startswith("`reward_funcs`: the model 'nope/nope' cannot be loaded")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "is a language model (LlamaForCausalLM), whose reward would",
        ),
        (
            {"id2label": {"0": "bad", "1": "good"}},
            "has 2 labels and a reward is one number: use the reward",
        ),
    ],
)
def test_a_head_that_gives_no_reward(
    changes: dict[str, Any], message: str, recipe: dict[str, Any], refusal: Callable[..., str], tiny_models: Any
) -> None:
    """A language model in place of a reward model gets a head of random weights, another one in each command."""
    folder = shutil.copytree(tiny_models.reward, "other_head")
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    recipe |= {"reward_funcs": ["other_head"], "method": "prior"}
    plain = {key: value for key, value in recipe.items() if key != "method"}
    assert all(message in refusal(command, given) for command, given in (("kl-rl", plain), ("sample", recipe)))


def test_an_adapter_with_the_configuration_of_its_base(tiny_models: Any, tmp_path: Path) -> None:
    """Some tools write both; it is an adapter all the same."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_models.policy), lora())
    model.save_pretrained(tmp_path / "adapter")
    assert base_of_adapter(str(tmp_path / "adapter")) == tiny_models.policy
    shutil.copy(Path(tiny_models.policy) / "config.json", tmp_path / "adapter")
    assert base_of_adapter(str(tmp_path / "adapter")) == tiny_models.policy
    shutil.copy(Path(tiny_models.policy) / "model.safetensors", tmp_path / "adapter")
    assert base_of_adapter(str(tmp_path / "adapter")) is None


def test_the_head_of_a_reward_model_that_is_an_adapter(tiny_models: Any, tmp_path: Path) -> None:
    """It has a head of its own, whatever the base model's configuration says."""
    base = AutoModelForSequenceClassification.from_pretrained(tiny_models.policy, num_labels=1)
    get_peft_model(base, lora(task_type="SEQ_CLS")).save_pretrained(tmp_path / "reward")
    training = KLRLConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    arguments = Arguments(TrainingScriptArguments(), training, ModelConfig(), DatasetMixtureConfig())
    check_reward_models([str(tmp_path / "reward")], arguments)
    with pytest.raises(ValueError, match="is a language model"):
        check_reward_models([tiny_models.policy], arguments)
