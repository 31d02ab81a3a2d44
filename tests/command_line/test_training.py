"""Training commands end to end on a tiny local model, and every bad input: one sentence, exit code 2, no model."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bayes import cli
from trl_bayes.benchmarks.tiny import letter_count_task
from trl_bayes.command_line import launch
from trl_bayes.command_line.parser import RecipeParser
from trl_bayes.targets import Tilt


TASK = letter_count_task()
MODULE = "rewards_of_test_training"
SOURCE = """
def count_a(completions, **kwargs):
    return [text.count("a") - text.count("b") / 2 for text in completions]

def at_least(n):
    def reward(completions, **kwargs):
        return [float(text.count("a") >= n) for text in completions]
    reward.__name__ = f"at_least_{n}"
    return reward

def by_column(completions, longest, **kwargs):
    return [0.0] * len(completions)

def without_kwargs(completions):
    return [0.0] * len(completions)
"""
ACCELERATE = ["--accelerate_config", "cpu_ddp"]

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def prior(letters_prior: str) -> str:
    return letters_prior


@pytest.fixture
def recipe(tmp_path: Path, prior: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A recipe that trains for two steps, with the working folder where its data and rewards are."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in TASK.prompts * 2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("LOCAL_RANK", "TRL_BAYES_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    yield {
        "model_name_or_path": prior,
        "dataset_name": "prompts.jsonl",
        "reward_funcs": [f"{MODULE}.count_a"],
        "output_dir": "out",
        "max_steps": 2,
        "learning_rate": "1e-3",  # what PyYAML makes of 1e-3
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": False,  # what YAML makes of `no`
        "report_to": "none",
        "disable_tqdm": True,
    }
    sys.modules.pop(MODULE, None)


def train(command: str, recipe: dict[str, Any], *flags: str) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli.main([command, "--config", "recipe.yaml", *flags])


def logged(folder: str = "out") -> list[dict[str, Any]]:
    state = json.loads(Path(folder, "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.fixture
def refused(recipe: dict[str, Any], refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Refused]:
    """What a command says of changes to the recipe that it must refuse; no model may be loaded."""

    def no_model(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", no_model)

    def run(changes: dict[str, Any], *flags: str, command: str = "f-dpg") -> str:
        return refusal(command, recipe | changes, *flags)

    yield run


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(
    ("command", "name"), [("kl-rl", "KL-RL"), ("f-dpg", "f-DPG"), ("dpg", "DPG"), ("tb", "TrajectoryBalance")]
)
def test_each_command_trains_saves_and_describes(
    command: str, name: str, recipe: dict[str, Any], prior: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(command, recipe)
    assert len(logged()) == 2 and {"posterior/log_z", "posterior/ess"} <= logged()[0].keys()
    trained, before = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in ("out", prior))
    assert any(not torch.equal(trained[key], before[key]) for key in before)
    assert AutoTokenizer.from_pretrained("out").get_vocab() == AutoTokenizer.from_pretrained(prior).get_vocab()
    card = Path("out", "README.md").read_text()
    module = importlib.import_module(f"trl_bayes.commands.{command.replace('-', '_')}")
    trainer_class = next(value for key, value in vars(module).items() if key.endswith("Trainer"))
    assert f"trained with {trainer_class._name}" in card and trainer_class._paper["id"] in card
    assert trainer_class._name == name or command == "tb"
    assert "trl-bayes" in card.split("---")[1]  # the tags
    assert "The model is in out." in capsys.readouterr().out


def test_recipe_sets_target_rewards_and_environment_and_flags_beat_it(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VARIABLE_OF_A_RECIPE", raising=False)
    recipe |= {
        "reward_funcs": [f"{MODULE}.count_a", {"name": f"{MODULE}.at_least", "n": 1}],
        "target": {
            "name": "product",
            "factors": [
                {"name": "tilt", "beta": 0.7, "rewards": ["count_a"]},
                {"name": "constraint", "rewards": "at_least_1"},
            ],
        },
        "divergence": "reverse_kl",  # would be refused with this target
        "env": {"VARIABLE_OF_A_RECIPE": 3},
    }
    train("f-dpg", recipe, "--divergence", "forward_kl", "--max_steps=1")
    assert len(logged()) == 1  # the flag's, not the recipe's
    assert {"rewards/count_a/mean", "rewards/at_least_1/mean"} <= logged()[0].keys()
    assert os.environ.pop("VARIABLE_OF_A_RECIPE") == "3"
    args = torch.load("out/training_args.bin", weights_only=False)
    assert args.divergence == "forward_kl" and args.learning_rate == 1e-3 and args.target == recipe["target"]


def test_all_by_flags_with_target_and_reward_as_json(recipe: dict[str, Any]) -> None:
    """What stands in a recipe can be said on the command line, mappings as JSON."""
    del recipe["reward_funcs"]
    flags = [part for key, value in recipe.items() for part in (f"--{key}", str(value).replace("False", "no"))]
    flags[flags.index("--bf16") + 1] = "false"
    target = {"name": "constraint", "rewards": "at_least_1"}
    reward = {"name": f"{MODULE}.at_least", "n": 1}
    cli.main(["dpg", *flags, "--target", json.dumps(target), "--reward_funcs", json.dumps(reward)])
    assert torch.load("out/training_args.bin", weights_only=False).target == target
    assert "rewards/at_least_1/mean" in logged()[0]


def test_target_by_name(recipe: dict[str, Any]) -> None:
    recipe["reward_funcs"] = {"name": f"{MODULE}.at_least", "n": 1}  # alone, without a list
    train("dpg", recipe, "--target", "constraint")
    assert torch.load("out/training_args.bin", weights_only=False).target == "constraint"


def test_reward_model_lora_and_evaluation(recipe: dict[str, Any], tiny_models: Any) -> None:
    """With a chat model, a sequence classifier as reward, LoRA, and a data folder with two splits."""
    Path("data").mkdir()
    for split in ("train", "test"):
        Path("data", f"{split}.jsonl").write_text('{"prompt": "say something"}\n{"prompt": "and more"}\n' * 4)
    recipe |= {
        "model_name_or_path": tiny_models.policy,
        "dataset_name": "data",
        "reward_model_name_or_path": tiny_models.reward,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 8,
        "max_steps": 2,
    }
    del recipe["reward_funcs"]
    train("kl-rl", recipe)
    assert "rewards/reward/mean" in logged()[0]
    assert Path("out", "adapter_model.safetensors").is_file()
    history = json.loads(Path("out", "trainer_state.json").read_text())["log_history"]
    assert any("eval_reward" in entry for entry in history)


def test_a_list_of_rewards_mixes_models_and_functions(recipe: dict[str, Any], tiny_models: Any) -> None:
    recipe |= {"model_name_or_path": tiny_models.policy, "max_steps": 1}
    recipe["reward_funcs"] = [f"{MODULE}.count_a", tiny_models.reward]
    train("kl-rl", recipe)
    assert {"rewards/count_a/mean", "rewards/reward/mean"} <= logged()[0].keys()


def test_resume_gives_the_uninterrupted_run(recipe: dict[str, Any]) -> None:
    """Two steps, and then two more from the checkpoint, are four steps."""
    recipe |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    train("f-dpg", recipe | {"output_dir": "straight"})
    train("f-dpg", recipe | {"output_dir": "parts", "max_steps": 2})
    Path("parts", "checkpoint-3").mkdir()  # a kill left it so
    Path("parts", "checkpoint-3", "posterior_state_0.pt").write_bytes(b"")
    train("f-dpg", recipe | {"output_dir": "parts"}, "--resume_from_checkpoint", "true")
    straight, parts = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in ("straight", "parts"))
    for key, weight in straight.items():
        torch.testing.assert_close(parts[key], weight)


def test_resume_from_another_trainer_or_target_is_refused(recipe: dict[str, Any], refused: Refused) -> None:
    checkpoint = Path("parts", "checkpoint-2")
    checkpoint.mkdir(parents=True)
    Path(checkpoint, "trainer_state.json").write_text("{}")
    state = {"trainer": "FDPGTrainer", "target_settings": repr(Tilt(0.1))}
    torch.save(state, Path(checkpoint, "posterior_state_0.pt"))
    resume = recipe | {"output_dir": "parts", "resume_from_checkpoint": True}
    message = refused(resume, command="dpg")
    assert "written by a run with FDPGTrainer, this one has DPGTrainer" in message
    assert "this one has Tilt(beta=0.3" in refused(resume | {"beta": 0.3})
    assert refused(recipe | {"output_dir": "new", "resume_from_checkpoint": "parts"}).startswith(
        "`resume_from_checkpoint=parts` is not a checkpoint"
    )


def test_overwrite_removes_the_checkpoints_of_the_earlier_run(recipe: dict[str, Any]) -> None:
    recipe |= {"save_strategy": "steps", "save_steps": 1}
    train("kl-rl", recipe)
    Path("out", "notes.txt").write_text("mine")
    train("kl-rl", recipe, "--overwrite", "--max_steps", "1")
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == ["checkpoint-1"]
    assert Path("out", "notes.txt").read_text() == "mine"


def test_a_crash_in_training_keeps_its_traceback(recipe: dict[str, Any]) -> None:
    Path(f"{MODULE}.py").write_text("def count_a(completions, **kwargs):\n    raise ValueError('from the reward')\n")
    with pytest.raises(ValueError, match="from the reward"):
        train("kl-rl", recipe)


# ---------------------------------------------------------------------------------------------------------------------
# Help


@pytest.mark.parametrize(("command", "own"), [("f-dpg", "--divergence"), ("dpg", "--replay_buffer_size")])
def test_help_is_complete_and_grouped(command: str, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    sections = [
        "TrainingScriptArguments (trl_bayes):",
        "PosteriorConfig (trl_bayes):",
        "GRPOConfig (trl):",
        "TrainingArguments (transformers):",
        "ModelConfig (trl):",
        "DatasetMixtureConfig (trl):",
    ]
    where = [printed.index(f"\n{title}\n") for title in sections]
    assert where == sorted(where)
    ours = printed[where[0] : where[2]]
    for flag in (own, "--target", "--beta", "--partition", "--prior_model_name_or_path", "--reward_funcs"):
        assert f"\n  {flag} " in ours or f"\n  {flag}," in ours, flag
    for flag in ("--config", "--accelerate_config", "--learning_rate", "--use_vllm", "--lora_r", "--test_split_size"):
        assert f"\n  {flag} " in printed or f"\n  {flag}," in printed, flag


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generation": 4}, "Unknown key `num_generation` in recipe.yaml (did you mean 'num_generations'?)"),
        ({"acelerate_config": "zero3"}, "(did you mean 'accelerate_config'?)"),
        ({"zzz": 1}, "Unknown key `zzz` in recipe.yaml: see --help."),
        ({"num_generations": 8.5}, "`num_generations` in recipe.yaml must be a whole number, but is 8.5."),
        ({"max_steps": None}, "`max_steps` in recipe.yaml must be a whole number, but is None."),
        ({"beta": "warm"}, "`beta` in recipe.yaml must be a number, but is 'warm'."),
        ({"beta": [1]}, "`beta` in recipe.yaml must be a number"),
        ({"beta": True}, "`beta` in recipe.yaml must be a number"),
        ({"learning_rate": {"a": 1}}, "`learning_rate` in recipe.yaml must be a number"),
        ({"reward_weights": ["a"]}, "`reward_weights` in recipe.yaml must be a list, each entry a number"),
        ({"reward_weights": {"a": 1}}, "`reward_weights` in recipe.yaml must be a list, each entry a number"),
        ({"use_cpu": "maybe"}, "`use_cpu` in recipe.yaml must be true or false"),
        ({"divergence": "jensen"}, "(did you mean 'jensen_shannon'?)"),
        ({"eval_strategy": "nope"}, "must be one of ['no', 'steps', 'epoch']"),
        ({"target": ["tilt"]}, "`target` in recipe.yaml must be"),
        ({"env": 3}, "`env` in recipe.yaml must be a mapping"),
        ({"model_name_or_path": ...}, "`model_name_or_path` is missing"),
        ({"model_name_or_path": "nope/nope"}, "`model_name_or_path`: the model 'nope/nope' cannot be loaded"),
        ({"model_name_or_path": "embedded:nope"}, "build it with recipes/embedded_prior"),
        ({"prior_model_name_or_path": "nope/nope"}, "`prior_model_name_or_path`: the model 'nope/nope'"),
        ({"dataset_name": "embedded:nope"}, "has no prompts.jsonl"),
        ({"dataset_name": ...}, "`dataset_name` is missing"),
        ({"dataset_name": "nope/nope"}, "The data set 'nope/nope' cannot be loaded"),
        ({"dataset_name": "nope.jsonl"}, "The data set 'nope.jsonl' cannot be loaded (no such file)."),
        ({"dataset_name": "broken.jsonl"}, "The data set 'broken.jsonl' cannot be loaded"),
        ({"dataset_name": "questions.csv"}, "no column 'prompt': it has ['question']"),
        ({"dataset_train_split": "trian"}, "no split 'trian' (did you mean 'train'?)"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "no split 'test': it has ['train']"),
        ({"datasets": [{"path": "x"}]}, "given twice"),
        ({"datasets": [{"pth": "x"}], "dataset_name": ...}, "'pth'"),
        ({"reward_funcs": ...}, "`reward_funcs` is missing"),
        ({"reward_funcs": ["parse"]}, "(did you mean 'parses'?)"),
        ({"reward_funcs": ["no_such_module.reward"]}, "No module named 'no_such_module'"),
        ({"reward_funcs": ["nope/nope"]}, "`reward_funcs`: the model 'nope/nope' cannot be loaded"),
        ({"reward_funcs": [f"{MODULE}.by_column"]}, "'by_column' needs 'longest', which is no column of the data"),
        ({"reward_funcs": [f"{MODULE}.without_kwargs"]}, "end its parameters with `**kwargs`."),
        ({"reward_funcs": [{"name": "max_length"}]}, "missing a required argument: 'characters'"),
        ({"target": "constrain"}, "Unknown target 'constrain'"),
        ({"target": {"name": "tilt", "betta": 1}}, "'betta'"),
        ({"target": {"name": "constraint"}, "divergence": "reverse_kl"}, "reverse_kl is infinite"),
        ({"top_p": 0.9}, "`top_p=0.9`"),
        ({"beta": 0.0}, "`beta=0` has no posterior"),
        ({"num_generations": 3}, "must be divisible by num_generations"),
        ({"output_dir": "prompts.jsonl/out"}, "cannot be written to: Not a directory."),
        ({"output_dir": "."}, "`output_dir=.` is not empty"),
        ({"resume_from_checkpoint": True}, "There is no checkpoint in `output_dir=out`"),
        ({"resume_from_checkpoint": "nope"}, "`resume_from_checkpoint=nope` is not a checkpoint"),
        ({"report_to": "no_such_tracker"}, "`report_to` names ['no_such_tracker']"),
        ({"accelerate_config": "zero9"}, "no accelerate configuration 'zero9' (did you mean 'zero3'?)"),
    ],
)
def test_a_bad_recipe_is_refused(changes: dict[str, Any], message: str, refused: Refused) -> None:
    Path("broken.jsonl").write_text('{"prompt": "a"\n')
    Path("questions.csv").write_text("question\nwhy\n")
    assert message in refused(changes)


def test_a_machine_without_a_gpu_is_told_the_flag(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    assert "add `--use_cpu` (`use_cpu: true` in a recipe)" in refused({"use_cpu": False, "bf16": True})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_generation", "4"], "Unknown argument `--num_generation` (did you mean '--num_generations'?)"),
        (["--num_generation=4"], "(did you mean '--num_generations'?)"),
        (["--num_proceses", "4"], "(did you mean '--num_processes'?)"),
        (["extra"], "Unknown argument `extra`"),
        (["--beta", "x"], "argument --beta: invalid float value: 'x'"),
        (["--beta"], "argument --beta: expected one argument"),
        (["--target", '{"name": '], "is not JSON"),
        (["--reward_funcs", '{"name": '], "is not JSON"),
        (["--config", "nope.yaml"], "The recipe 'nope.yaml' cannot be read"),
        (["--config", "broken.yaml"], "The recipe 'broken.yaml' is not YAML"),
        (["--config", "list.yaml"], "The recipe 'list.yaml' must be a mapping"),
        (["--accelerate_config"], "`--accelerate_config` needs a name or a file."),
        (["--accelerate_config", "zero9"], "(did you mean 'zero3'?)"),
    ],
)
def test_a_bad_command_line_is_refused(flags: list[str], message: str, refused: Refused) -> None:
    Path("broken.yaml").write_text("a: [1\n")
    Path("list.yaml").write_text("- a\n")
    assert message in refused({}, *flags)


def test_a_used_output_folder_is_refused_until_overwrite(recipe: dict[str, Any], refused: Refused) -> None:
    Path("out").mkdir()
    Path("out", "model.safetensors").write_text("another run's")
    assert "set `--overwrite`" in refused({})
    Path("out", "checkpoint-9").mkdir()
    assert "'parses'" in refused({"reward_funcs": ["parse"]}, "--overwrite")
    assert Path("out", "checkpoint-9").is_dir()  # nothing is removed by a run that does not start


def test_an_output_folder_without_write_permission(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an unprivileged user would meet it; root may write everywhere."""

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("trl_bayes.command_line.folders.tempfile.TemporaryFile", denied)
    assert refused({}) == "`output_dir=out` cannot be written to: Permission denied."


def test_only_the_first_process_of_a_machine_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, expected in (("0", "trl-bayes f-dpg: error: no\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            RecipeParser([], prog="trl-bayes f-dpg").error("no")
        assert stopped.value.code == 2 and capsys.readouterr().err == expected


# ---------------------------------------------------------------------------------------------------------------------
# Launching


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What accelerate's launcher is asked to run, without running it."""
    asked: list[Any] = []
    monkeypatch.setattr(launch, "launch_command", asked.append)
    return asked


def test_launcher_options_start_accelerate_with_the_module(recipe: dict[str, Any], launched: list[Any]) -> None:
    train("f-dpg", recipe, *ACCELERATE, "--num_processes", "3", "--beta", "0.5", "--main_process_port=29511")
    (args,) = launched
    assert args.module and args.training_script == "trl_bayes.commands.f_dpg"
    assert args.training_script_args == ["--config", "recipe.yaml", "--beta", "0.5"]
    assert args.config_file.endswith("accelerate_configs/cpu_ddp.yaml")
    assert args.num_processes == 3 and args.main_process_port == 29511
    assert "TRL_BAYES_LAUNCHED" not in os.environ


def test_launcher_options_in_a_recipe(recipe: dict[str, Any], launched: list[Any]) -> None:
    train(
        "dpg", recipe | {"accelerate_config": "zero3", "num_processes": 2, "multi_gpu": True}, "--num_processes", "4"
    )
    (args,) = launched
    assert args.config_file.endswith("zero3.yaml") and args.multi_gpu
    assert args.num_processes == 4  # the flag beats the recipe


def test_an_accelerate_configuration_by_path(recipe: dict[str, Any], launched: list[Any]) -> None:
    Path("mine.yaml").write_text("num_processes: 1\n")
    train("dpg", recipe, "--accelerate_config", "mine.yaml")
    assert launched[0].config_file == "mine.yaml"


def test_an_accelerate_configuration_in_the_users_folder(
    recipe: dict[str, Any], launched: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("mine.yaml").write_text("num_processes: 1\n")
    train("dpg", recipe | {"accelerate_config": "~/mine.yaml"})
    assert launched[0].config_file == str(tmp_path / "mine.yaml")


def test_a_launched_process_trains(
    recipe: dict[str, Any], launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same recipe, options of the launcher included."""
    monkeypatch.setenv("TRL_BAYES_LAUNCHED", "1")
    train("dpg", recipe | {"accelerate_config": "cpu_ddp"})
    assert not launched and len(logged()) == 2


def test_a_failed_process_gives_its_exit_code(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: Any) -> None:
        raise subprocess.CalledProcessError(7, "python")

    monkeypatch.setattr(launch, "launch_command", fail)
    with pytest.raises(SystemExit) as stopped:
        train("dpg", recipe, "--num_processes", "1")
    assert stopped.value.code == 7
