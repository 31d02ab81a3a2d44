"""What trains is evaluated and sampled by the same recipe, with the same meaning: rewards, models, templates, folders.

Each test trains for a step, evaluates and samples by one recipe, and compares what the commands saw.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel
from trl.chat_template_utils import add_response_schema

from trl_bayes import cli
from trl_bayes.evaluation.files import read_report


MODULE = "rewards_of_test_same_reading"
SOURCE = """
import functools, json

def note(what, value):
    with open("seen.jsonl", "a") as file:
        file.write(json.dumps([what, value]) + "\\n")

def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]

def has_mark(completions, **kwargs):
    note("keys", sorted({key for c in completions for key in ([] if isinstance(c, str) else c[0])}))
    return [float("<think>" in text_of(c)) for c in completions]

def length(completions, **kwargs):
    return [len(text_of(c)) / 10 for c in completions]

def tokens(completion_ids, **kwargs):
    note("longest", max(map(len, completion_ids)))
    return [len(ids) / 100 for ids in completion_ids]

def scaled(completions, factor, **kwargs):
    return [factor * len(text_of(c)) / 10 for c in completions]

partial = functools.partial(scaled, factor=2.0)

class Callable:
    def __call__(self, completions, **kwargs):
        return [len(text_of(c)) / 10 for c in completions]

class AsyncCallable:
    async def __call__(self, completions, **kwargs):
        return [len(text_of(c)) / 10 for c in completions]

instance, async_instance = Callable(), AsyncCallable()

def with_all(completions, trainer_state, log_metric, log_extra, **kwargs):
    log_metric("mine", 1.0)
    log_extra("mine", [text_of(c) for c in completions])
    return [float(trainer_state.global_step >= 0)] * len(completions)

def with_columns(completions, samples, reward_funcs, **kwargs):
    note("columns", [samples[0], reward_funcs[0]])
    return [float(number) for number in samples]

def prompts_seen(prompts, completions, **kwargs):
    note("others", sorted(kwargs))
    return [0.0] * len(completions)
"""


MCMC = ("--method", "mcmc", "--num_steps", "2", "--num_samples", "2", "--thin", "1")


@pytest.fixture(scope="module")
def marking(tmp_path_factory: pytest.TempPathFactory, tiny_models: Any) -> str:
    """A chat model that often thinks aloud, with a tokenizer that parses it."""
    folder = tmp_path_factory.mktemp("marking")
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.policy)
    model = AutoModelForCausalLM.from_pretrained(tiny_models.policy)
    with torch.no_grad():
        for token in ("<think>", "</think>"):
            model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(token), 0] = 1.7
    model.save_pretrained(folder)
    add_response_schema(tokenizer).save_pretrained(folder)
    return str(folder)


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
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    for file, columns in (("prompts", {"number": 3}), ("columns", {"samples": 1, "reward_funcs": "x"})):
        rows = [{"prompt": text, **columns} for text in ("Say a", "Say b")]
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("LOCAL_RANK", "TRL_BAYES_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    yield {
        "model_name_or_path": tiny_models.policy,
        "dataset_name": "prompts.jsonl",
        "reward_funcs": [f"{MODULE}.length"],
        "beta": 1.0,
        "output_dir": "trained",
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    sys.modules.pop(MODULE, None)


class Seen:
    """What the commands made of one recipe."""

    def __init__(self, recipe: dict[str, Any]):
        self.recipe = recipe
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))

    def __call__(self, command: str, *flags: str) -> dict[str, Any]:
        """Runs a command, and returns what rewards noted meanwhile, the last of each."""
        Path("seen.jsonl").write_text("")
        cli.main([command, "--config", "recipe.yaml", *flags])
        return dict(map(json.loads, Path("seen.jsonl").read_text().splitlines()))

    def train(self) -> dict[str, Any]:
        return self("kl-rl")

    def logged(self) -> dict[str, Any]:
        state = json.loads(Path("trained", "trainer_state.json").read_text())
        return next(entry for entry in state["log_history"] if "loss" in entry)

    def evaluate(self, policy: str = "trained", *flags: str) -> dict[str, Any]:
        return self(
            "evaluate", "--policies", policy, "--num_samples", "20", "--num_reference_samples", "40",
            "--diversity", "false", "--device", "cpu", *flags,
        )  # fmt: skip

    def sample(self, *flags: str) -> dict[str, Any]:
        return self("sample", "--method", "prior", "--num_samples", "20", "--device", "cpu", *flags)


def rewards_of(name: str) -> float:
    """The mean of a row of the evaluation, such as the prior's."""
    (row,) = [row for row in read_report("runs/evaluation").rows if row.name == name]
    assert row.evaluation is not None
    return row.evaluation.metrics["reward"].value


def sample_settings() -> dict[str, Any]:
    """What `sample` says it was told."""
    return json.loads(Path("runs/sample/diagnostics.json").read_text())["settings"]


# ---------------------------------------------------------------------------------------------------------------------
# Lengths, templates


def test_a_recipe_without_a_length_has_trainings_everywhere(recipe: dict[str, Any]) -> None:
    """TRL's 512."""
    del recipe["max_completion_length"]
    seen = Seen(recipe | {"reward_funcs": [f"{MODULE}.tokens"]})
    seen.train()
    args = torch.load("trained/training_args.bin", weights_only=False)
    seen.evaluate("trained", "--num_samples", "2", "--num_reference_samples", "2", "--max_prompts", "1")
    seen.sample("--num_samples", "2", "--max_prompts", "1")
    assert args.max_completion_length == 512
    assert read_report("runs/evaluation").problem["longest completion"] == "512 tokens"
    assert sample_settings()["max_completion_length"] == 512


def test_rewards_are_given_parsed_messages(recipe: dict[str, Any], marking: str) -> None:
    """By a tokenizer with a response template: reasoning stands beside the content."""
    recipe |= {"model_name_or_path": marking, "prompt_as_message": True, "reward_funcs": [f"{MODULE}.has_mark"]}
    seen = Seen(recipe)
    keys = seen.train()["keys"]
    assert "reasoning_content" in keys or "thinking" in keys
    assert seen.logged()["rewards/has_mark/mean"] == 0
    assert set(seen.evaluate()["keys"]) == set(keys) and rewards_of("prior") == rewards_of("trained") == 0
    assert set(seen.sample()["keys"]) == set(keys)
    drawn = load_dataset("runs/sample", split="train")
    assert any("<think>" in row["completion"][0]["content"] for row in drawn)  # the texts themselves have marks


def test_arguments_of_the_chat_template(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's template writes an empty thought where it must not think: all commands continue the same tokens."""
    continued: dict[str, set[tuple[int, ...]]] = {}
    original = GenerationMixin.generate
    running = [""]

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = zip(kwargs["input_ids"], kwargs["attention_mask"].bool(), strict=True)
        continued.setdefault(running[0], set()).update(tuple(ids[own].tolist()) for ids, own in pairs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    tokenizer = AutoTokenizer.from_pretrained(recipe["model_name_or_path"])
    messages = [[{"role": "user", "content": text}] for text in ("Say a", "Say b")]
    prompts = {
        think: {
            tuple(ids)
            for ids in tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=think)[
                "input_ids"
            ]
        }
        for think in (True, False)
    }
    for think in (True, False):
        for name in ("trained", "runs"):
            shutil.rmtree(name, ignore_errors=True)
        seen = Seen(recipe | {"prompt_as_message": True, "chat_template_kwargs": {"enable_thinking": think}})
        for running[0], run in (("train", seen.train), ("evaluate", seen.evaluate), ("sample", seen.sample)):
            continued.clear()
            run()
            assert prompts[think] <= continued[running[0]] and not prompts[not think] & continued[running[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        ("partial", "scaled"),
        ("instance", "Callable"),
        ("async_instance", "AsyncCallable"),
        ("Callable", "Callable"),  # a class, which is its own factory
        ("with_all", "with_all"),
        ("with_columns", "with_columns"),
    ],
)
def test_rewards_of_every_kind(reward: str, name: str, recipe: dict[str, Any]) -> None:
    """They have the name that TRL logs, and what a target reads by that name is there."""
    target = {"name": "tilt", "beta": 1.0, "rewards": [name]}
    data = {"dataset_name": "columns.jsonl"} if name == "with_columns" else {}
    seen = Seen(recipe | {"reward_funcs": [f"{MODULE}.{reward}"], "target": target} | data)
    columns = seen.train().get("columns")
    assert f"rewards/{name}/mean" in seen.logged()
    assert seen.evaluate().get("columns") == columns
    assert read_report("runs/evaluation").problem["rewards"] == name
    assert seen.sample().get("columns") == columns
    assert sample_settings()["rewards"] == [name]


@pytest.mark.parametrize("remove_unused_columns", [False, True])
def test_columns_are_those_that_training_hands_on(remove_unused_columns: bool, recipe: dict[str, Any]) -> None:
    recipe |= {"reward_funcs": [f"{MODULE}.prompts_seen"], "remove_unused_columns": remove_unused_columns}
    seen = Seen(recipe | {"target": "tilt"})
    others = seen.train()["others"]
    assert ("number" in others) == (not remove_unused_columns) and "trainer_state" in others
    assert seen.evaluate()["others"] == seen.sample()["others"] == others


@pytest.mark.parametrize("command", ["kl-rl", "evaluate", "sample"])
@pytest.mark.parametrize(
    "rewards",
    [
        [{"name": "length_between", "maximum": 3}, {"name": "length_between", "maximum": 8}],
        [f"{MODULE}.instance", f"{MODULE}.Callable"],
        ["some/reward", "other/reward"],
    ],
    ids=["factory", "callables", "models"],
)
def test_two_rewards_of_one_name_are_refused(
    command: str, rewards: list[Any], recipe: dict[str, Any], refusal: Callable[..., str]
) -> None:
    flags = {"evaluate": {"policies": [recipe["model_name_or_path"]]}, "sample": {"method": "prior"}}.get(command, {})
    message = refusal(command, recipe | flags | {"reward_funcs": rewards})
    assert message.startswith("Two rewards are called '") and "`called`" in message


def test_two_rewards_told_apart_by_called(recipe: dict[str, Any]) -> None:
    rewards = [{"name": "length_between", "maximum": n, "called": f"to_{n}", "unit": "tokens"} for n in (3, 5)]
    seen = Seen(recipe | {"reward_funcs": rewards})
    seen.train()
    seen.evaluate()
    assert {"rewards/to_3/mean", "rewards/to_5/mean"} <= seen.logged().keys()
    assert read_report("runs/evaluation").problem["rewards"] == "to_3, to_5"


# ---------------------------------------------------------------------------------------------------------------------
# Models and folders


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
    seen.evaluate(f"same={adapter}")
    (row,) = read_report("runs/evaluation").runs
    assert row.evaluation.metrics["kl_prior"].value == pytest.approx(0, abs=1e-4)
    seen.evaluate("trained", "--overwrite")
    (row,) = read_report("runs/evaluation").runs
    assert row.evaluation.metrics["kl_prior"].value == pytest.approx(0, abs=1e-4)  # nothing was learned
    seen.evaluate(f"base={tiny_models.policy}", "--overwrite")
    (row,) = read_report("runs/evaluation").runs
    assert row.evaluation.metrics["kl_prior"].value > 0.1  # the adapter is on
    seen.sample()


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
    (row,) = read_report("runs/evaluation").runs
    estimate = row.evaluation.metrics["kl_prior"]
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


def test_a_reward_model_of_a_revision_that_is_not_there(recipe: dict[str, Any], refusal: Callable[..., str]) -> None:
    """All commands look for it where TRL does."""
    recipe |= {"reward_model_name_or_path": "nope/nope", "method": "prior"}
    said = {
        refusal("kl-rl", {key: value for key, value in recipe.items() if key != "method"}),
        refusal("evaluate", recipe | {"policies": [recipe["model_name_or_path"]], "method": "auto"}),
        refusal("sample", recipe),
    }
    assert len(said) == 1 and said.pop().startswith("`reward_funcs`: the model 'nope/nope' cannot be loaded")
