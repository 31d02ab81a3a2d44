"""One recipe for several commands: rewards that write down what they are given, and the commands run by it."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_bayes import cli
from trl_bayes.evaluation.files import read_report


MODULE = "rewards_of_one_recipe"
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


@contextmanager
def recipe_in(folder: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A recipe that trains for a step, with its data and its rewards in the folder, which is the working folder."""
    (folder / f"{MODULE}.py").write_text(SOURCE)
    for file, columns in (("prompts", {"number": 3}), ("columns", {"samples": 1, "reward_funcs": "x"})):
        rows = [{"prompt": text, **columns} for text in ("Say a", "Say b")]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("HOME", str(folder / "home"))
    for name in ("LOCAL_RANK", "TRL_BAYES_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    yield {
        "model_name_or_path": model,
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


def evaluated(name: str, folder: str = "runs/evaluation") -> dict[str, Any]:
    """The estimates of a row of the evaluation, such as the prior's."""
    (row,) = [row for row in read_report(folder).rows if row.name == name]
    assert row.evaluation is not None
    return row.evaluation.metrics
