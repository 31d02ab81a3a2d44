"""Data in every kind of file, and prompts that no model can continue: each works, or is one sentence, everywhere."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import DatasetMixtureConfig

from trl_bayes import cli
from trl_bayes.command_line.arguments import TrainingScriptArguments
from trl_bayes.command_line.data import hub_dataset, load_data, select_split


COMMANDS = ("kl-rl", "evaluate", "sample")
KINDS = ("jsonl", "JSONL", "json", "Json", "jsonl.gz", "JSONL.gz", "json.bz2", "csv", "csv.gz", "CSV", "csv.xz")
KINDS += ("parquet", "PARQUET")
MODULE = "mine_of_test_data"
SOURCE = """
from trl_bayes.targets import Tilt

class Longer(Tilt):
    pass
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_models: Any) -> str:
    """A GPT-2 with 24 positions, whose tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.policy)
    tokenizer.chat_template = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        eos = tokenizer.eos_token_id
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=24,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=eos,
            eos_token_id=eos,
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(tmp_path: Path, plain: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    yield {
        "model_name_or_path": plain,
        "dataset_name": "prompts.jsonl",
        "reward_funcs": [{"name": "length_in", "unit": "characters"}],
        "beta": 10.0,
        "max_completion_length": 4,
        "output_dir": "out",
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    sys.modules.pop(MODULE, None)


def flags(command: str, recipe: dict[str, Any]) -> list[str]:
    return {
        "kl-rl": [],
        "evaluate": ["--policies", recipe["model_name_or_path"], "--num_samples", "2", "--num_reference_samples", "4"],
        "sample": ["--method", "prior", "--num_samples", "2"],
    }[command]


def run(command: str, recipe: dict[str, Any], *more: str) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli.main([command, "--config", "recipe.yaml", *flags(command, recipe), *more])


@pytest.fixture
def refused(recipe: dict[str, Any], refusal: Callable[..., str]) -> Callable[..., str]:
    """The one sentence with which all commands refuse changes to the recipe."""

    def say(changes: dict[str, Any], *more: str) -> str:
        said = {refusal(each, recipe | changes, *flags(each, recipe), "--overwrite", *more) for each in COMMANDS}
        assert len(said) == 1, said
        return said.pop()

    return say


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write(name: str) -> None:
    """Two prompts in a file of this name."""
    table = Dataset.from_dict({"prompt": ["a", "b"]})
    kind = name.lower().split(".")[1]
    getattr(table, f"to_{ {'jsonl': 'json'}.get(kind, kind) }")(f"plain.{kind}")
    content = Path(f"plain.{kind}").read_bytes()
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(name.rpartition(".")[2])
    Path(name).write_bytes(content if packed is None else packed(content))


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"x.{kind}"
    write(name)
    script = TrainingScriptArguments(dataset_name=name)
    data = load_data(script, DatasetMixtureConfig())
    assert select_split(data, "train", script)["prompt"][:] == ["a", "b"]
    assert hub_dataset(name) is None and hub_dataset(f"gone/{name}") is None


def test_a_compressed_file_that_is_not_there(refused: Callable[..., str]) -> None:
    assert refused({"dataset_name": "no.jsonl.gz"}) == "The data set 'no.jsonl.gz' cannot be loaded (no such file)."


def test_a_broken_line(refused: Callable[..., str], tmp_path: Path) -> None:
    """With what is wrong with it, and not only that something is."""
    file = tmp_path / "broken.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"\n{"prompt": "c"}\n')
    assert "Missing a comma or '}' after an object member" in refused({"dataset_name": str(file)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reads_a_compressed_file(command: str, recipe: dict[str, Any]) -> None:
    write("x.jsonl.gz")
    run(command, recipe | {"dataset_name": "x.jsonl.gz"})


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def rows_of(*prompts: Any) -> None:
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("x.csv", "prompt,n\na,1\n,2\n", "A prompt of the data is missing: make it a text, or a list of messages"),
        ("x.csv", "prompt,n\n1,1\n2,2\n", "A prompt of the data is 1: make it a text"),
        ("x.csv", "prompt,n\n1.5,1\n,2\n", "A prompt of the data is 1.5: make it a text"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "A prompt of the data is missing"),
        ("x.jsonl", '{"prompt": 3}\n{"prompt": 4}\n', "A prompt of the data is 3"),
        ("x.jsonl", '{"prompt": ["a", "b"]}\n', "A prompt of the data is ['a', 'b']"),
        ("x.jsonl", '{"prompt": []}\n', "A prompt of the data is []"),
        ("x.jsonl", '{"prompt": [{"content": "no role"}]}\n', "A prompt of the data is [{'content': 'no role'}]"),
        ("x.jsonl", '{"prompt": ""}\n{"prompt": ""}\n', "The prompt '' has no tokens"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "A prompt of the data is 3"),
        ("x.jsonl", '{"prompt": "a", "completions": "b"}\n', "The data has a column 'completions'"),
        ("x.jsonl", '{"prompt": "a", "prompts": "b"}\n', "The data has a column 'prompts'"),
    ],
)
def test_cells_that_are_no_prompt(file: str, content: str, message: str, refused: Callable[..., str]) -> None:
    Path(file).write_text(content)
    assert refused({"dataset_name": file}).startswith(message)


def test_a_template_with_a_blank_cell(refused: Callable[..., str]) -> None:
    """It would be written as the word None."""
    Path("x.csv").write_text("question,n\nwhy,1\n,2\n")
    said = refused({"dataset_name": "x.csv", "prompt_template": "Q: {question}"})
    assert "does not fit a row of the data (ValueError: question is blank)" in said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("prompts", [[None, "a"], ["a", "b", None, None]], ids=["first", "later"])
def test_a_stream_with_a_blank_cell(
    prompts: list[str | None], command: str, recipe: dict[str, Any], refusal: Callable[..., str]
) -> None:
    """A later one turns out in the middle of a training, and is one sentence there too."""
    rows_of(*prompts)
    recipe |= {"dataset_streaming": True, "max_steps": 2}
    more = [] if command == "kl-rl" else ["--max_prompts", "4"]
    assert refusal(command, recipe, *flags(command, recipe), *more).startswith("A prompt of the data is missing")


def test_messages_without_a_chat_template(refused: Callable[..., str]) -> None:
    message = "The prompts are messages, and the tokenizer has no chat template to write them by"
    assert refused({"prompt_as_message": True}).startswith(message)
    rows_of(*[[{"role": "user", "content": "a"}]] * 2)
    assert refused({}).startswith(message)


def test_a_prompt_that_does_not_fit_into_the_models_positions(
    recipe: dict[str, Any], refused: Callable[..., str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(recipe["model_name_or_path"])
    longest = tokenizer.decode(tokenizer("word " * 30)["input_ids"][:20])
    number = len(tokenizer(longest)["input_ids"])
    assert number == 20
    rows_of("a", longest)
    said = refused({"max_completion_length": 5})
    assert said == (
        "A prompt of 20 tokens and a completion of `max_completion_length=5` do not fit into the model's 24 "
        "positions: lower `max_completion_length`, or shorten the prompt or leave it out."
    )
    for command in COMMANDS:
        run(command, recipe | {"max_completion_length": 4}, "--overwrite")  # exactly full


# ---------------------------------------------------------------------------------------------------------------------
# Targets and numbers


@pytest.mark.parametrize("command", COMMANDS)
def test_a_number_that_yaml_takes_for_a_text(command: str, recipe: dict[str, Any]) -> None:
    """`1e-1` is a text in YAML 1.1; PyYAML writes such texts without quotes."""
    recipe |= {"target": {"name": "tilt", "beta": "1e1"}, "temperature": "1e0", "reward_weights": ["5e-1"]}
    recipe["reward_funcs"] = [{"name": "length_between", "maximum": "2e0"}]
    run(command, recipe)
    assert "beta: 1e1" in Path("recipe.yaml").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_target_of_the_working_folder_under_the_script(command: str, recipe: dict[str, Any]) -> None:
    """As a process: the script, unlike `python -m`, has its own folder on the path and not the working folder."""
    Path(f"{MODULE}.py").write_text(SOURCE)
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | {"target": {"name": f"{MODULE}.Longer", "beta": 10.0}}))
    Path("scripts").mkdir()
    Path("scripts", "trl-bayes").write_text("from trl_bayes.cli import main\nmain()\n")
    subprocess.run(
        [sys.executable, "scripts/trl-bayes", command, "--config", "recipe.yaml", *flags(command, recipe)],
        check=True,
        capture_output=True,
    )
