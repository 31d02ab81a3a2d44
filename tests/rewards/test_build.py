"""Rewards by name, by name and arguments, by path and as models; what cannot be one is refused with one sentence."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trl.rewards

import trl_bayes.rewards
from trl_bayes.rewards import build_reward, build_rewards
from trl_bayes.rewards.build import ready_rewards
from trl_bayes.rewards.calling import check_reward_arguments, reward_name


MODULE = "rewards_of_test_build"
SOURCE = """
NUMBER = 3

def count_a(completions, **kwargs):
    return [float(text.count("a")) for text in completions]

def count(completions, letter, weight=1.0, **kwargs):
    return [weight * text.count(letter) for text in completions]

def at_least(n):
    return lambda completions, **kwargs: [float(text.count("a") >= n) for text in completions]

def typo(completion):
    return 0.0

def not_a_factory():
    return 3

class Longer:
    def __init__(self, than=2):
        self.than = than

    def __call__(self, completions, **kwargs):
        return [float(len(text) > self.than) for text in completions]
"""


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of rewards that is found because it is the working folder."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop(MODULE, None)


def test_our_rewards_by_name() -> None:
    assert build_reward("parses") is trl_bayes.rewards.parses
    assert build_rewards(["parses", "no_syntax_warning"]) == [
        trl_bayes.rewards.parses,
        trl_bayes.rewards.no_syntax_warning,
    ]


def test_rewards_of_trl_by_name() -> None:
    assert build_reward("accuracy_reward") is trl.rewards.accuracy_reward


def test_every_ready_reward_exists() -> None:
    names = ready_rewards()
    assert {"parses", "max_length", "accuracy_reward", "get_soft_overlong_punishment"} <= names.keys()
    for name, module in names.items():
        assert callable(getattr(sys.modules[module], name)), name


def test_a_mapping_sets_parameters_of_a_reward_function() -> None:
    reward = build_reward({"name": f"{MODULE}.count", "letter": "b", "weight": 2.0})
    assert reward(completions=["abb", "a"], prompts=["", ""], other=[1, 2]) == [4.0, 0.0]
    assert reward_name(reward) == "count"
    with pytest.raises(ValueError, match="'letter' set, and would be given the data's column 'letter'"):
        check_reward_arguments([reward], ["prompt", "letter"])


def test_a_mapping_gives_a_factory_its_arguments() -> None:
    reward = build_reward({"name": "max_length", "characters": 3})
    assert reward.__name__ == "max_length_3"
    assert reward(prompts=["", ""], completions=["abc", "abcd"]) == [1.0, 0.0]
    punish = build_reward({"name": "get_soft_overlong_punishment", "max_completion_len": 4, "soft_punish_cache": 2})
    assert punish(completion_ids=[[1], [1] * 9]) == [0.0, -1.0]


def test_dotted_paths_from_the_working_folder() -> None:
    assert build_reward(f"{MODULE}.count_a")(completions=["aa"]) == [2.0]
    assert build_reward({"name": f"{MODULE}.at_least", "n": 2})(completions=["aa", "a"]) == [1.0, 0.0]
    assert build_reward(f"{MODULE}.Longer")(completions=["aa", "aaa"]) == [0.0, 1.0]  # a class with its defaults
    assert build_reward({"name": f"{MODULE}.Longer", "than": 1})(completions=["aa"]) == [1.0]


def test_reward_models_are_left_to_the_trainer(working_folder: Path) -> None:
    (working_folder / "my_model").mkdir()
    assert build_rewards(["some/model", "my_model", os.fspath(working_folder)]) == [
        "some/model",
        "my_model",
        os.fspath(working_folder),
    ]


def test_one_reward_need_not_be_in_a_list() -> None:
    assert build_rewards(None) == []
    assert build_rewards("parses") == build_rewards(trl_bayes.rewards.parses) == [trl_bayes.rewards.parses]
    assert len(build_rewards({"name": "max_length", "characters": 3})) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("parse", r"no reward 'parse' \(did you mean 'parses'\?\)"),
        ("zzz", r"no reward 'zzz': use one of \[.*'parses'"),
        ("no_such_module.reward", "cannot be imported .ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{MODULE}.nope", "cannot be imported .AttributeError: .* 'nope'"),
        ("broken_rewards.reward", "cannot be imported .ZeroDivisionError"),
        (".reward", "cannot be imported .ValueError"),
        (f"{MODULE}.NUMBER", "is a int: it must be a function"),
        (f"{MODULE}.typo", r"missing a required argument: 'completion'.*itself takes `completions`"),
        (f"{MODULE}.not_a_factory", "returns a int"),
        ("max_length", r"\{name: max_length, characters: \.\.\.\}"),
        ({"name": "max_length", "character": 3}, "'characters'"),
        ({"name": "max_length", "characters": -1}, r"cannot be made from \{'characters': -1\}"),
        (
            {"name": "max_length", "characters": "x"},
            "`characters` of the reward 'max_length' must be a number",
        ),
        ({"name": "parses", "strict": True}, r"no parameter 'strict' that could be set: .* \(\[\]\)"),
        ({"name": f"{MODULE}.count", "completions": 3}, r"no parameter 'completions' .*\['letter', 'weight'\]"),
        ({"name": "some/model", "scale": 2}, r"reward model, which takes no arguments: leave out \['scale'\]"),
        ({"characters": 3}, "a mapping with `name`"),
        ({"name": ""}, "a mapping with `name`"),
        (3, "A reward is a name"),
        (None, "A reward is a name"),
    ],
)
def test_refusals(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_reward(spec)
    assert "\n" not in str(caught.value)
