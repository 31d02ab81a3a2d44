"""`trl-bayes demo-rl`: its stages, what is not done twice, what is refused before any model is loaded."""

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTTrainer

from tests.helpers.demonstrations import DEMONSTRATIONS, VOWELS
from trl_bayes import cli
from trl_bayes.command_line.demonstration_recipe import DemonstrationArguments, split_section_flags
from trl_bayes.command_line.demonstrations import prepare
from trl_bayes.command_line.stages import Stage
from trl_bayes.commands import demo_rl


MODULE = "rewards_of_test_demo_rl"
COMMON = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}

Refused = Callable[..., str]


@pytest.fixture
def recipe(tmp_path: Path, tiny_models: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Both stages, of a few steps each."""
    (tmp_path / f"{MODULE}.py").write_text(VOWELS)
    write("demonstrations.jsonl", DEMONSTRATIONS, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("RANK", "LOCAL_RANK", "TRL_BAYES_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)
    yield {
        "output_dir": "out",
        "clone": {
            "model_name_or_path": tiny_models.policy,
            "dataset_name": "demonstrations.jsonl",
            "held_out": 4,
            "prior_demonstrations": 8,
            "max_completion_length": 6,
            "max_steps": 4,
            "save_steps": 2,
            **COMMON,
        },
        "rl": {
            "trainer": "KLRLTrainer",
            "reward_funcs": [f"{MODULE}.vowels"],
            "beta": {"rule": "demonstrations", "epsilon": 0.5},
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 2,
            **COMMON,
        },
    }
    sys.modules.pop(MODULE, None)


def write(name: str, rows: list[dict[str, Any]], folder: Path = Path()) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(recipe: dict[str, Any], *flags: str) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli.main(["demo-rl", "--config", "recipe.yaml", *flags])


def record(stage: str) -> dict[str, Any]:
    return json.loads(Path("out", stage, "stage.json").read_text())


def weights(folder: str) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one: str, other: str) -> bool:
    ours, theirs = weights(one), weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def no_model(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a model was loaded")


def forbid_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", no_model)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_launched_processes_get_the_sections_as_they_were_given(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(demo_rl, "launch", lambda module, flags, own: asked.append(own))
    given = ["--clone.max_length", "null", "--clone.run_name", "'007'", "--rl.learning_rate", "1.0e-5"]
    given += ["--rl.beta", "{rule: demonstrations, epsilon: 1.0e-5}", "--rl.run_name", "😀 e", "--rl.beta", ".inf"]
    run(recipe, "--num_processes", "2", *given)
    (own,) = asked
    assert split_section_flags(own)[1] == split_section_flags(given)[1]
    assert split_section_flags(given)[1][:2] == [("clone", "max_length", None), ("clone", "run_name", "007")]


def test_sections_from_the_command_line_alone(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        word
        for section in ("clone", "rl")
        for key, value in recipe[section].items()
        for word in (f"--{section}.{key}", json.dumps(value))
    ]
    with pytest.raises(SystemExit):
        cli.main(["demo-rl", "--output_dir", "out", *flags, "--clone.max_stepz", "3"])
    said = capsys.readouterr().err
    assert "Unknown key `max_stepz` in the section `clone`" in said and "did you mean 'max_steps'" in said


def test_clones_then_trains_from_the_clone_and_does_nothing_twice(
    recipe: dict[str, Any], tiny_models: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe)
    assert not same("out/clone", tiny_models.policy) and not same("out/rl", "out/clone")
    figures = record("clone")["figures"]
    assert (figures["demonstrations"], figures["prior_demonstrations"]) == (16, 8)
    # The cross-entropy of the four that were held out, by a forward pass without padding
    model, tokenizer = (kind.from_pretrained("out/clone") for kind in (AutoModelForCausalLM, AutoTokenizer))
    floor = [json.loads(row) for row in Path("out/clone/prior_demonstrations.jsonl").read_text().splitlines()]
    assert len(floor) == 8 and any(not row["ended"] for row in floor)
    losses = {row["prompt"]: -log_prob(model, tokenizer, row) for row in DEMONSTRATIONS}
    entropy = figures["cross_entropy"]["value"]
    subsets = held_out_sums(list(losses.values()))
    assert min(abs(total / 4 - entropy) for total in subsets) < 1e-4
    args = torch.load("out/rl/training_args.bin", weights_only=False)
    assert args.beta == pytest.approx(0.5 / entropy) == record("rl")["figures"]["beta"]
    state = json.loads(Path("out/rl/trainer_state.json").read_text())
    assert state["log_history"][0]["posterior/kl_prior"] == 0  # the clone is start and prior
    rows = [json.loads(row) for row in Path("out/rl/prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in DEMONSTRATIONS]
    with monkeypatch.context() as patch:
        forbid_models(patch)
        run(recipe)
    assert capsys.readouterr().err.count("nothing changed") == 2
    # One stage is changed, and with it what follows: nothing of the other is done again
    changed = {**recipe, "rl": {**recipe["rl"], "max_steps": 1}}
    before = Path("out/clone/model.safetensors").stat().st_mtime_ns
    run(changed, "--overwrite")
    assert Path("out/clone/model.safetensors").stat().st_mtime_ns == before
    assert json.loads(Path("out/rl/trainer_state.json").read_text())["global_step"] == 1


def log_prob(model: Any, tokenizer: Any, row: dict[str, str]) -> float:
    start = len(tokenizer(row["prompt"])["input_ids"])
    ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(dim=1)
    return scores.gather(1, ids[0, 1:, None]).squeeze(1)[start - 1 :].sum().item()


def held_out_sums(losses: list[float]) -> list[float]:
    """The sums of any four."""
    return [math.fsum(chosen) for chosen in itertools.combinations(losses, 4)]


def test_goes_on_where_it_was_interrupted(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends with the weights of a run without interruption."""
    recipe["rl"]["max_steps"] = 1
    run(recipe)
    Path("out").rename("whole")

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    start = SFTTrainer.train
    steps: list[int] = []

    def train(self: Any, **kwargs: Any) -> Any:
        if not steps:
            self.add_callback(Interrupt())
        steps.append(int(str(kwargs["resume_from_checkpoint"]).rpartition("-")[2] or 0) if steps else 0)
        return start(self, **kwargs)

    monkeypatch.setattr(SFTTrainer, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    assert not record("clone")["finished"]
    run(recipe)
    assert steps == [0, 2] and record("rl")["finished"]
    assert same("out/clone", "whole/clone") and same("out/rl", "whole/rl")


def test_adapters_are_cloned_into_and_trained_on_by_xpo(recipe: dict[str, Any]) -> None:
    """The clone is an adapter, and start and prior of one more: stage 2 trains it on and keeps it as it was."""
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "learning_rate": 0.05}
    recipe["clone"] |= lora
    recipe["rl"] |= {
        "trainer": "XPOTrainer",
        "num_prior_samples": 4,
        "beta": 0.3,
        "learning_rate": 0.05,
        "max_steps": 3,
    }
    run(recipe)
    for stage in ("clone", "rl"):
        assert Path("out", stage, "adapter_model.safetensors").is_file() and record(stage)["finished"]
    logs = [log for log in json.loads(Path("out/rl/trainer_state.json").read_text())["log_history"] if "loss" in log]
    assert logs[0]["objective/kl"] == pytest.approx(0, abs=1e-4)  # at the clone, the prior of this stage
    assert logs[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-4) and logs[-1]["objective/kl"] > 1e-3


def test_fits_a_reward_to_preferences_in_between(recipe: dict[str, Any], refusal: Refused) -> None:
    recipe["reward"] = {
        "preference_funcs": [f"{MODULE}.vowels", {"name": "length_in", "unit": "characters"}],
        "preference_weights": [1.0, -0.01],
        "num_pairs": 24,
        "max_completion_length": 6,
        "max_steps": 2,
        **COMMON,
    }
    del recipe["rl"]["reward_funcs"]
    flags = ["--rl.max_steps", "1", "--rl.beta=0.3"]
    words = refusal("demo-rl", recipe, *flags, "--reward.max_length", "4")  # when pairs have been drawn
    assert "`max_length=4` in the section `reward` leaves out" in words and not record("reward")["finished"]
    run(recipe, *flags, "--overwrite")
    pairs = [json.loads(row) for row in Path("out/reward/preferences.jsonl").read_text().splitlines()]
    assert 0 < len(pairs) <= 24 and record("reward")["figures"]["pairs"] == len(pairs)
    for pair in pairs:
        worth = [sum(c in "aeiou" for c in text) - len(text) / 100 for text in (pair["chosen"], pair["rejected"])]
        assert worth[0] > worth[1]
    state = json.loads(Path("out/rl/trainer_state.json").read_text())
    assert "rewards/reward/mean" in state["log_history"][0] and state["global_step"] == 1
    assert torch.load("out/rl/training_args.bin", weights_only=False).beta == 0.3


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, each with one sentence and before a model is loaded


@pytest.fixture
def refused(recipe: dict[str, Any], refusal: Refused, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """What the command says of changes to sections."""
    forbid_models(monkeypatch)

    def refuse(section: str, changes: dict[str, Any] | None, *flags: str) -> str:
        changed = None if changes is None else {**recipe.get(section, {}), **changes}
        return refusal("demo-rl", {**recipe, section: changed}, *flags)

    return refuse


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("clone", {"learning_rat": 1}, "Unknown key `learning_rat` in the section `clone` of recipe.yaml (did"),
        ("rl", {"num_generation": 1}, "Unknown key `num_generation` in the section `rl` of recipe.yaml (did you mean"),
        ("rl", {"trainer": "KLRLTrainr"}, "There is no trainer 'KLRLTrainr' (did you mean 'KLRLTrainer'?): use one"),
        ("rl", {"model_name_or_path": "x"}, "`model_name_or_path` in the section `rl` of recipe.yaml is what the"),
        ("rl", {"reward_funcs": []}, "`reward_funcs` is missing in the section `rl`"),
        ("rl", {"beta": {"rule": "other", "epsilon": 1}}, "must be a number, or `{rule: demonstrations, epsilon"),
        ("rl", {"beta": {"rule": "demonstrations", "epsilon": -1}}, "`epsilon=-1.0` in recipe.yaml must be"),
        ("rl", {"beta": {"rule": "demonstrations", "eps": 1}}, "Unknown key `eps` in `beta` in the section `rl`"),
        ("rl", {"temperature": 0.7}, "measures the clone at temperature 1"),
        ("clone", {"output_dir": "x"}, "`output_dir` in the section `clone` of recipe.yaml is what the command sets"),
        ("clone", {"held_out": 0}, "The rule for `beta` needs held-out demonstrations"),
        ("clone", {"held_out": 20}, "`held_out=20` of 20 demonstrations leaves none to clone"),
        ("clone", {"held_out": -1}, "`held_out=-1.0` is neither a share nor a number"),
        ("clone", {"prior_demonstrations": -1}, "`prior_demonstrations` must be at least 0"),
        ("clone", {"packing": True}, "`packing`"),
        ("clone", {"assistant_only_loss": True}, "`assistant_only_loss` in the section `clone` would clone other"),
        ("clone", {"completion_only_loss": False}, "`completion_only_loss` in the section `clone` would clone other"),
        ("clone", {"loss_type": "dft"}, "`loss_type`, `label_smoothing_factor` and `neftune_noise_alpha` in"),
        ("clone", {"label_smoothing_factor": 0.1}, "would make it another clone than the likeliest"),
        ("clone", {"max_length": 4}, "`max_length=4` in the section `clone` cuts some demonstrations: set it to null"),
        ("rl", {"trainer": "XPOTrainer", "num_generations": 3}, "`num_generations=3` is odd"),
        ("rl", {"eval_strategy": "steps", "eval_steps": 1}, "The data has no split 'test': it has ['train']"),
        ("rl", {"num_generations": 2, "per_device_train_batch_size": 64}, "prompts, and one generation takes 32"),
        ("rl", {"report_to": ["wandb"]}, "`report_to` names ['wandb'], not installed or unknown"),
        ("rl", {"target": {"name": "tilt", "beta": 1.0, "rewards": "nosuch"}}, "reads the reward 'nosuch'"),
        ("rl", {"target": "constraint"}, "reverse_kl is infinite"),
        ("rl", {"reward_funcs": ["trl.rewards.accuracy_reward"]}, "needs 'solution', which is no column"),
        ("clone", {"dataset_name": None}, "`dataset_name` is missing in the section `clone`"),
        ("clone", {"dataset_train_split": "trian"}, "has no split 'trian' (did you mean 'train'?)"),
        ("clone", {"model_name_or_path": "no/model"}, "the model 'no/model' cannot be loaded"),
        ("clone", {"learning_rate": "fast"}, "`learning_rate` in the section `clone` of recipe.yaml must be a number"),
        ("clone", None, "The stage `clone` is missing in recipe.yaml"),
        ("reward", {}, "The stage `reward` in recipe.yaml is empty"),
        ("reward", {"num_pairs": 3}, "The section `reward` needs preferences: either `dataset_name`, or"),
        ("reward", {"preference_funcs": ["parses"], "preference_weights": [1, 2]}, "2 `preference_weights` for 1"),
        ("reward", {"dataset_name": "demonstrations.jsonl", **COMMON}, "have no column 'chosen'"),
    ],
)  # fmt: skip
def test_bad_sections(refused: Refused, section: str, changes: dict[str, Any] | None, words: str) -> None:
    assert words in refused(section, changes)
    assert not Path("out").exists()


QUESTION, ANSWER = [{"role": "user", "content": "say"}], [{"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a", "answer": "b"}], "have no column 'completion': they have ['prompt', 'answer']"),
        ([{"messages": QUESTION + ANSWER}], "they have ['messages'], so split each conversation into `completion`"),
        ([{"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}], "is None, with the prompt 'a'"),
        ([{"prompt": "a", "completion": ANSWER}], "with the prompt 'a': make both texts, or both lists of messages"),
        ([{"prompt": QUESTION, "completion": []}], "is []: make it one message with the role 'assistant' and a text"),
        ([{"prompt": QUESTION, "completion": QUESTION}], "make it one message with the role 'assistant' and a text"),
        ([{"prompt": QUESTION, "completion": ["yes"]}], "is ['yes']: make it one message with the role 'assistant'"),
        ([{"prompt": QUESTION, "completion": ANSWER, "tools": "[]"}], "have a column 'tools', with which the stages"),
        ([{"completion": "b"}], "The prompt '' has no tokens"),
        ([], "cannot be loaded (a file is empty)"),
    ],
)
def test_bad_demonstrations(refused: Refused, rows: list[dict[str, Any]], words: str) -> None:
    write("bad.jsonl", rows)
    assert words in refused("clone", {"dataset_name": "bad.jsonl", "held_out": 0.1})


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a", "chosen": "b"}], "have no column 'rejected': they have ['prompt', 'chosen']"),
        ([{"prompt": "a", "chosen": ANSWER, "rejected": ANSWER}], "make both texts, or both lists of messages"),
        ([{"chosen": "a", "rejected": None}, {"chosen": "a", "rejected": "b"}], "is None: make it a text, or a list"),
        ([{"prompt": "", "chosen": "", "rejected": "b"}], "1 of 1 preferences have a text without tokens"),
        (
            [{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "b" * 30}],
            "`max_length=20` in the section `reward` leaves out 1 of 2 preferences, of which the longest has 30",
        ),
    ],
)
def test_bad_preferences(refused: Refused, rows: list[dict[str, Any]], words: str) -> None:
    """`RewardTrainer` leaves out what is longer, without a word."""
    write("bad.jsonl", rows)
    assert words in refused("reward", {"dataset_name": "bad.jsonl", "max_length": 20, **COMMON})


def test_an_empty_section_and_an_unknown_one(recipe: dict[str, Any], refusal: Refused) -> None:
    assert "The stage `rl` in recipe.yaml is empty" in refusal("demo-rl", {**recipe, "rl": {}})
    assert "Unknown key `rewrad` in recipe.yaml (did you mean 'reward'?)" in refusal(
        "demo-rl", {**recipe, "rewrad": {"num_pairs": 3}}
    )


def stages_of(recipe: dict[str, Any]) -> dict[str, Stage]:
    sections = {name: recipe[name] for name in ("clone", "rl")}
    return prepare(DemonstrationArguments("out", **sections), "recipe.yaml").stages


def test_a_stage_of_other_data(recipe: dict[str, Any], refused: Refused) -> None:
    stages_of(recipe)["clone"].begin()
    write("demonstrations.jsonl", DEMONSTRATIONS[1:])
    assert "The folder out/clone holds the stage `clone` with other data: set `--overwrite`" in refused("clone", {})


def test_what_changes_a_stage_changes_those_behind_it(recipe: dict[str, Any]) -> None:
    before = stages_of(recipe)
    recipe["clone"]["logging_steps"] = 5
    assert stages_of(recipe) != before  # in their settings, but
    assert [stage.identity for stage in stages_of(recipe).values()] == [stage.identity for stage in before.values()]
    recipe["clone"]["learning_rate"] = 2e-3
    after = stages_of(recipe)
    assert after["rl"].identity["settings"] == before["rl"].identity["settings"]
    assert after["rl"].identity["previous"] != before["rl"].identity["previous"]
    # Another reward function of the same name
    sys.modules.pop(MODULE)
    Path(f"{MODULE}.py").write_text(VOWELS.replace("aeiou", "aeiouy"))
    assert stages_of(recipe)["rl"].functions != after["rl"].functions


def test_no_beta_follows_is_one_sentence(recipe: dict[str, Any], refusal: Refused) -> None:
    """That the clone is as good as the expert turns out only when it is there."""
    recipe["rl"]["beta"]["expert_entropy"] = 10.0
    stages = stages_of(recipe)
    stages["clone"].begin()
    stages["clone"].finish({"cross_entropy": {"value": 9.5}})
    assert "KL(expert||clone) is measured as -0.5, from which no `beta` follows" in refusal("demo-rl", recipe)
