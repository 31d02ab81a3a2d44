"""One reading of a recipe: what defines prior, posterior and prompts is the same in training and in a study of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import trl_bayes
from trl_bayes import CTRLConfig, DPGConfig, FDPGConfig, KLRLConfig
from trl_bayes.assets import own_or_shipped, shipped_file
from trl_bayes.command_line.arguments import Arguments, StudyArguments
from trl_bayes.command_line.models import loading_arguments
from trl_bayes.command_line.parser import read_recipe
from trl_bayes.command_line.recipe import (
    make_arguments,
    read_command_line,
    read_study,
    trainers,
    training_parser,
)
from trl_bayes.trainers.posterior_config import PosteriorConfig


SHIPPED = sorted(
    str(path.relative_to(shipped_file("recipes")))
    for path in shipped_file("recipes").glob("*/*.yaml")
    if path.parent.name != "demonstrations"  # stages of `demo-rl` in one file
)
COMMANDS = {"kl-rl": "KLRLTrainer", "f-dpg": "FDPGTrainer", "dpg": "DPGTrainer", "ctrl": "CTRLTrainer"}
COMMANDS |= {"tb": "TrajectoryBalanceTrainer", "xpo": "XPOTrainer"}
OF_THE_POSTERIOR = (
    "prior_model_name_or_path",
    "target",
    "beta",
    "reward_weights",
    "max_completion_length",
    "temperature",
    "chat_template_kwargs",
    "trust_remote_code",
    "num_prior_samples",
    "remove_unused_columns",
)
HERE = ["--use_cpu", "true", "--bf16", "false", "--output_dir", "out"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(recipe: dict[str, Any]) -> list[str]:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", "recipe.yaml"]


def study(argv: list[str]) -> Arguments:
    return read_study(StudyArguments, "evaluate", argv, usage="", description=None)[1]


def training(trainer: str, argv: list[str]) -> Arguments:
    parser = training_parser("x", trainers()[trainer])
    _, own = read_command_line(parser, [*argv, *HERE])
    return make_arguments(parser, own)


def assert_same(studied: Arguments, trained: Arguments) -> None:
    for name in OF_THE_POSTERIOR:
        assert getattr(studied.training, name) == getattr(trained.training, name), name
    assert loading_arguments(studied.model, studied.training) == loading_arguments(trained.model, trained.training)
    assert studied.model == trained.model and studied.mixture == trained.mixture
    for name in trained.script.__dataclass_fields__.keys() - {"overwrite"}:
        assert getattr(studied.script, name) == getattr(trained.script, name), name


# ---------------------------------------------------------------------------------------------------------------------
# The same by both


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes(name: str) -> None:
    file = shipped_file("recipes") / name
    (command, *_) = re.findall(r"^# trl-bayes (\S+) --config", file.read_text(), re.MULTILINE)
    recipe = read_recipe(str(file))
    flags = ["--config", str(file)]
    if recipe.get("beta") == 0:
        flags += ["--beta", "0.1"]  # pure RL has no posterior to study
    batch = 8 * recipe["per_device_train_batch_size"]  # in one process what 8 do
    assert_same(study(flags), training(COMMANDS[command], [*flags, "--per_device_train_batch_size", str(batch)]))


@pytest.mark.parametrize("trainer", trainers())
@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"temperature": 0.7, "max_completion_length": 33, "beta": "2e-1"},
        {"target": {"name": "constraint", "threshold": 0.2}, "reward_weights": ["1e-1", 2]},
        {"chat_template_kwargs": {"enable_thinking": False}, "model_init_kwargs": {"revision": "other"}},
        {"load_in_4bit": True, "dtype": "bfloat16", "attn_implementation": "sdpa", "model_revision": "12e45"},
        {"num_prior_samples": 7, "remove_unused_columns": True, "trust_remote_code": True},
        {"prior_model_name_or_path": "~/prior", "dataset_name": "~/data.jsonl", "prompt_words": 3},
    ],
    ids=lambda recipe: ",".join(recipe),
)
def test_every_trainer_with_and_without_what_defines_the_posterior(trainer: str, recipe: dict[str, Any]) -> None:
    """Without: both have the defaults of the trainer's configuration."""
    if trainer == "CTRLTrainer":
        recipe = {key: value for key, value in recipe.items() if key not in ("target", "beta")}
    if trainer == "XPOTrainer":  # whose posterior is a tilt, of the policy that it starts from
        recipe = {key: value for key, value in recipe.items() if key not in ("target", "prior_model_name_or_path")}
    argv = write({"learning_rate": "1e-5", "num_generations": 4, "bf16": True, "use_vllm": True, **recipe})
    argv += ["--trainer", trainer]
    trained = training(trainer, [*argv, "--use_vllm", "false"])
    assert_same(study(argv), trained)
    if not recipe:
        assert trained.training.max_completion_length == 512  # TRL's, and neither 256 nor anything of ours


def test_flags_of_a_study_are_those_of_training() -> None:
    flags = ["--chat_template_kwargs", '{"a": 1}', "--target", '{"name": "constraint"}', "--temperature", "0.5"]
    flags += ["--model_init_kwargs", '{"revision": "x"}', "--reward_weights", "1", "2", "--load_in_8bit"]
    assert_same(study(flags), training("FDPGTrainer", flags))
    beaten = write({"temperature": 0.9, "max_completion_length": 9, "chat_template_kwargs": {"b": 2}})
    read = study([*beaten, *flags]).training
    assert (read.temperature, read.max_completion_length, read.chat_template_kwargs) == (0.5, 9, {"a": 1})


# ---------------------------------------------------------------------------------------------------------------------
# Which trainer a recipe is for


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({}, PosteriorConfig),
        ({"learning_rate": 1e-5, "partition": "running"}, PosteriorConfig),
        ({"divergence": "forward_kl"}, FDPGConfig),
        ({"replay_buffer_size": 64}, DPGConfig),
        ({"inference_n": 4}, CTRLConfig),
        ({"trainer": "CTRLTrainer"}, CTRLConfig),
        ({"trainer": "KLRLTrainer"}, KLRLConfig),
    ],
)
def test_the_configuration_is_that_of_the_recipes_trainer(recipe: dict[str, Any], expected: type) -> None:
    read = study(write(recipe)).training
    assert expected.__dataclass_fields__.keys() <= read.__dataclass_fields__.keys()
    assert (type(read) is expected) or not expected.__name__.startswith(("Posterior", "CTRL", "KLRL"))
    assert (read.target is not None) == (expected is CTRLConfig)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"trainer": "CTRLTrainr"}, r"There is no trainer 'CTRLTrainr' \(did you mean 'CTRLTrainer'\?\)"),
        ({"inference_n": 4, "replay_buffer_size": 3}, "No trainer has all of"),
        ({"inference_n": 1}, "`inference_n=1` leaves nothing to choose from"),
        ({"beta": 0.0}, "`beta=0` is pure RL"),
        ({"learning_rate": "fast"}, "`learning_rate` in recipe.yaml must be a number, but is 'fast'"),
        ({"max_steps": 1.5}, "`max_steps` in recipe.yaml must be a whole number"),
        ({"chat_template_kwargs": [1]}, "`chat_template_kwargs` in recipe.yaml must be"),
    ],
)
def test_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(write(recipe))


def test_training_refuses_the_recipe_of_another_trainer(refusal: Callable[..., str]) -> None:
    message = refusal("kl-rl", {"trainer": "CTRLTrainer", "output_dir": "out", "bf16": False, "use_cpu": True})
    assert message.startswith("`trainer=CTRLTrainer` says that this is no recipe for KLRLTrainer")


def test_whole_numbers_may_have_an_exponent() -> None:
    assert training("KLRLTrainer", write({"max_steps": "1e3", "seed": 7.0})).training.max_steps == 1000


def test_every_trainer_is_found() -> None:
    assert trainers().keys() == {name for name in trl_bayes.__all__ if name.endswith("Trainer")}
    assert {*COMMANDS.values()} <= trainers().keys()


def test_shipped_recipes_and_their_data_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = "recipes/prior_targets/moments.yaml"
    recipe = read_recipe(path)
    assert own_or_shipped(recipe["dataset_name"]).is_file()
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text("beta: 2.0")  # the user's own comes first
    assert read_recipe(path) == {"beta": 2.0}
    with pytest.raises(ValueError, match="'recipes/nope.yaml' cannot be read"):
        read_recipe("recipes/nope.yaml")
