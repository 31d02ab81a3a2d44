"""Every recipe parses as it stands, and every launch line of the READMEs trains for two updates with tiny stand-ins.

Launch lines are read from the READMEs, so that they, the YAML files and the commands cannot drift apart. What is
replaced in a recipe before it runs is `stand_in`, and nothing else; what it does not replace is what the test checks.
"""

import importlib
import itertools
import json
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerBase

from tests.helpers.llama import llama_config
from trl_bayes import cli
from trl_bayes.command_line.launch import accelerate_config_file
from trl_bayes.command_line.parser import read_recipe
from trl_bayes.command_line.recipe import make_arguments, read_command_line, training_parser
from trl_bayes.rewards import build_rewards
from trl_bayes.targets import build_target
from trl_bayes.trainers.posterior_trainer import PosteriorTrainer


ROOT = Path(__file__).parents[2]
# Of a single training; those of `demo-rl` have sections, and a test of their own
OF_STAGES = "demonstrations"
SMOLLM2 = [path for path in ROOT.glob("recipes/smollm2/*/*.yaml") if path.name not in ("methods.yaml", "demo_rl.yaml")]
RECIPES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("recipes/*/*.yaml"), *SMOLLM2] if path.parent.name != OF_STAGES
)
READMES = sorted(ROOT.glob("recipes/**/README.md"))
# Rows with the columns that each data set has on the Hub
HUB_DATA: dict[str, dict[str, Any]] = {
    "stanfordnlp/imdb": {"text": "I rented this one because of all the talk about it.", "label": 0},
    "openai/gsm8k": {"question": "How many are 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    "allenai/real-toxicity-prompts": {
        "filename": "0.txt",
        "prompt": {"text": "The man in the moon", "toxicity": 0.2},
        "continuation": {"text": " came down", "toxicity": None},
        "challenging": False,
    },
    "trl-lib/tldr": {"prompt": "SUBREDDIT: r/x\n\nPOST: It rained.\n\nTL;DR:", "completion": " Rain."},
}


class Launch(NamedTuple):
    """A launch line of a README."""

    command: str
    recipe: str
    flags: tuple[str, ...]  # what stands behind the recipe

    def __str__(self) -> str:
        return " ".join([self.command, self.recipe.removeprefix("recipes/"), *self.flags])


def launches(readme: Path) -> list[Launch]:
    """The launch lines in the bash blocks of a README."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "--config" not in words:
                continue
            where = words.index("--config")
            module = next((word for word in words if word.startswith("trl_bayes.commands.")), None)
            command = words[1] if module is None else module.rpartition(".")[2].replace("_", "-")
            found.append(Launch(command, words[where + 1], tuple(words[where + 2 :])))
    return found


LAUNCHES = list(
    dict.fromkeys(launch for readme in READMES for launch in launches(readme) if launch.command != "demo-rl")
)


def trainer_of(command: str) -> type[PosteriorTrainer]:
    module = importlib.import_module(f"trl_bayes.commands.{command.replace('-', '_')}")
    return next(value for name, value in vars(module).items() if name.endswith("Trainer"))


def is_for_8_gpus(recipe: str) -> bool:
    return recipe.endswith("eight_gpus.yaml")


def is_for_a_laptop(recipe: str) -> bool:
    return read_recipe(str(ROOT / recipe))["model_name_or_path"].startswith(("embedded:", "models/"))


# ---------------------------------------------------------------------------------------------------------------------
# Recipes and READMEs belong together


def test_there_are_recipes_for_one_and_for_8_gpus_of_each_task() -> None:
    tasks = {Path(recipe).parent.name for recipe in RECIPES if not is_for_a_laptop(recipe)}
    assert tasks == {
        "lexical_constraint", "gender_balance", "sentiment", "detoxification", "gsm8k", "summarization",
    }  # fmt: skip
    for task in tasks:
        assert {f"recipes/{task}/{name}.yaml" for name in ("one_gpu", "eight_gpus")} <= set(RECIPES)
        headings = re.findall(r"^## (.*)$", (ROOT / "recipes" / task / "README.md").read_text(), re.MULTILINE)
        assert {"What it shows", "Expected shape of the result", "Cost"} <= set(headings)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_launch_line_in_a_readme_and_in_its_head(recipe: str) -> None:
    assert recipe in {launch.recipe for launch in LAUNCHES}
    head = (ROOT / recipe).read_text().split("\n\n")[0]
    lines = re.findall(r"^# trl-bayes (\S+) --config (\S+)(.*)$", head, re.MULTILINE)
    assert lines, head
    known = {(launch.command, launch.recipe) for launch in LAUNCHES}
    assert {(command, path) for command, path, _ in lines} <= known and {path for _, path, _ in lines} == {recipe}


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_launch_lines_name_what_exists(launch: Launch) -> None:
    assert launch.recipe in RECIPES
    assert issubclass(trainer_of(launch.command), PosteriorTrainer)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_links_lead_somewhere(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            assert (readme.parent / target).exists(), target
    for mentioned in re.findall(r"recipes/[\w/]+\.yaml|accelerate_configs/\w+\.yaml", text):
        assert (ROOT / mentioned).is_file(), mentioned


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if is_for_8_gpus(recipe)])
def test_8_gpus_do_the_same_update_as_one(recipe: str) -> None:
    """The same numbers of prompts and completions in an update, under ZeRO-3 with vLLM; nothing else is changed."""
    many, one = (read_recipe(str(ROOT / path)) for path in (recipe, recipe.replace("eight_gpus", "one_gpu")))
    assert completions_per_update(many) == completions_per_update(one)
    assert completions_per_update(one) % one["num_generations"] == 0
    assert many["accelerate_config"] == "zero3" and many["use_vllm"] and many["vllm_mode"] == "colocate"
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps", "output_dir"}
    launching = {key for key in many if key.startswith(("vllm", "use_vllm", "accelerate"))}
    model = {"model_name_or_path"} if "gsm8k" in recipe else set()
    different = {key for key in many.keys() | one.keys() if many.get(key) != one.get(key)}
    assert different <= batch | launching | model
    assert many["output_dir"] != one["output_dir"]


def completions_per_update(config: dict[str, Any]) -> int:
    processes = 8 if "accelerate_config" in config else 1
    return processes * config["per_device_train_batch_size"] * config.get("gradient_accumulation_steps", 1)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes as they stand


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_the_parser_and_the_config_take_it_as_it_stands(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real batch sizes and groups: one process does what 8 would, and the machine's own fields are harmless."""
    monkeypatch.chdir(ROOT)
    config = read_recipe(launch.recipe)
    parser = training_parser(launch.command, trainer_of(launch.command))
    here = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    if is_for_8_gpus(launch.recipe):
        here += ["--per_device_train_batch_size", str(8 * config["per_device_train_batch_size"])]
    launcher_flags, own = read_command_line(parser, ["--config", launch.recipe, *launch.flags, *here])
    for flag, value in itertools.pairwise(launcher_flags):
        assert flag != "--accelerate_config" or Path(accelerate_config_file(value)).is_file()
    arguments = make_arguments(parser, own)
    args = arguments.training
    assert args.learning_rate == config["learning_rate"] and args.max_steps > 0
    assert args.generation_batch_size % args.num_generations == 0
    rewards = build_rewards(arguments.script.reward_funcs)
    names = [reward.split("/")[-1] if isinstance(reward, str) else reward.__name__ for reward in rewards]
    target = build_target(args.target, args.beta or 1.0)
    target.bind(names)
    assert args.make_divergence().allows_hard_constraints or not target.hard


# ---------------------------------------------------------------------------------------------------------------------
# Two updates


def stand_in(config: dict[str, Any], folder: Path, policy: str, reward_model: str, classifier: str) -> dict[str, Any]:
    """The recipe with what this machine lacks, or what takes long, replaced; all other fields stay."""
    replaced = dict(config)
    if not config["model_name_or_path"].startswith("embedded:"):
        replaced |= {"model_name_or_path": policy, "max_completion_length": 4}
    if config["dataset_name"] in HUB_DATA:
        (folder / "data").mkdir()
        rows = [json.dumps(HUB_DATA[config["dataset_name"]])] * 16
        (folder / "data" / f"{config.get('dataset_train_split', 'train')}.jsonl").write_text("\n".join(rows))
        replaced["dataset_name"] = str(folder / "data")
        replaced.pop("dataset_config", None)  # a name on the Hub
    replaced["reward_funcs"] = [stand_in_reward(spec, reward_model, classifier) for spec in config["reward_funcs"]]
    accumulation = min(config.get("gradient_accumulation_steps", 1), 2)
    one_group = completions_per_update(config) == config["num_generations"]
    return replaced | {
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": accumulation,
        "num_generations": 8 * accumulation if one_group else 4,
        "num_prior_samples": 512 if "mu" in str(config.get("target")) else 16,  # moments warn where they are few
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def stand_in_reward(spec: Any, reward_model: str, classifier: str) -> Any:
    if isinstance(spec, str):
        return reward_model if "/" in spec else spec
    return spec | {"model": classifier} if "model" in spec else spec


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: PreTrainedTokenizerBase) -> str:
    """A classifier with the labels of those in the recipes."""
    labels = dict(enumerate(sorted(label for path in RECIPES for label in re.findall(r"label: (\w+)", read(path)))))
    folder = tmp_path_factory.mktemp("classifier")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        label2id = {name: i for i, name in labels.items()}
        config = llama_config(chat_tokenizer, initializer_range=1.0, id2label=labels, label2id=label2id)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return str(folder)


def read(recipe: str) -> str:
    return (ROOT / recipe).read_text(encoding="utf-8")


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_it_trains(
    launch: Launch,
    tmp_path: Path,
    tiny_models: Any,
    classifier: str,
    fake_vllm: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one process, as those that the launcher of an 8-GPU recipe starts; vLLM's fields reach a fake one."""
    monkeypatch.chdir(ROOT)  # recipes name their data from there
    monkeypatch.setenv("TRL_BAYES_LAUNCHED", "1")
    monkeypatch.setattr("trl_bayes.command_line.extras.require_extra", lambda package, what: None)  # of vLLM
    # A tiny model writes no words and solves no problems
    monkeypatch.setitem(sys.modules, "textblob", types.SimpleNamespace(TextBlob=a_text_with_some_polarity))
    written = itertools.cycle(["She is amazing, aged 64.", "He is not. #### 8", "He is 7. #### 7", of_every_kind()])
    for module in ("contains", "json_schema", "lexicon", "maths", "regex"):
        monkeypatch.setattr(f"trl_bayes.rewards.{module}.completion_text", lambda completion: next(written))
    config = stand_in(read_recipe(launch.recipe), tmp_path, tiny_models.policy, tiny_models.reward, classifier)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    flags = without(launch.flags, "--output_dir", "--max_steps")
    cli.main([launch.command, "--config", str(tmp_path / "recipe.yaml"), *flags])
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    updates = [entry for entry in history if "loss" in entry]
    assert len(updates) == 2 and any((tmp_path / "out").glob("*model.safetensors"))
    assert all(entry["posterior/frac_unscored"] < 1 for entry in updates)
    # The tiny classifier may find no completion harmless, and then nothing may be learned
    has_evidence = any(entry.get("posterior/frac_no_evidence", 0) < 1 for entry in updates)
    assert any(entry["grad_norm"] > 0 for entry in updates) == has_evidence
    if float(dict(itertools.pairwise(flags)).get("--beta", config.get("beta", 1.0))) > 0:
        assert {"posterior/log_z", "posterior/ess", "posterior/kl_prior"} <= updates[0].keys()


def a_text_with_some_polarity(text: str) -> types.SimpleNamespace:
    """In the place of TextBlob, which is not installed with the package."""
    return types.SimpleNamespace(sentiment=types.SimpleNamespace(polarity=len(text) % 3 - 1))


def of_every_kind() -> str:
    """A JSON object with all the keys that a prompt of the JSON recipes asks for."""
    rows = [json.loads(line) for line in read("recipes/smollm2/json/train.jsonl").splitlines()]
    keys = {key: kind["type"] for row in rows for key, kind in json.loads(row["schema"])["properties"].items()}
    return json.dumps({key: 1 if kind == "integer" else "one" for key, kind in keys.items()})


def without(flags: tuple[str, ...], *names: str) -> list[str]:
    """Flags without some of them, each with its value."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for name, value in pairs if name not in names for word in (name, value)]
