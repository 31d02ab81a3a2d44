"""Numbers that a configuration holds as texts, and objects by their path."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from trl_bayes.rewards import build_reward
from trl_bayes.rewards.specification import import_object, with_numbers
from trl_bayes.targets import build_target


def takes(
    number: float = 0,
    whole: int = 0,
    either: float | None = None,
    text: str = "",
    text_or_number: str | int = "",
    each: Mapping[str, float] | None = None,
    untold=None,  # noqa: ANN001
) -> None: ...


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"number": "1e-1", "whole": "1e2", "either": "-.5"}, {"number": 0.1, "whole": 100, "either": -0.5}),
        ({"text": "1e5", "text_or_number": "3", "untold": "1e5"}, ...),
        ({"each": {"a": "5e-1", "b": 2}}, {"each": {"a": 0.5, "b": 2}}),
        ({"number": 3, "whole": True, "either": None, "another": "1"}, ...),
    ],
)
def test_texts_are_numbers_where_only_numbers_are_taken(given: dict[str, Any], expected: Any) -> None:
    found = with_numbers(takes, given, "it")
    assert found == (given if expected is ... else expected)
    assert [type(value) for value in found.values()] == [
        type(value) for value in (given if expected is ... else expected).values()
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"number": "warm"}, "`number` of it must be a number, but is 'warm'."),
        ({"either": [1]}, r"`either` of it must be a number, but is \[1\]."),
        ({"whole": {"a": 1}}, "`whole` of it must be a number"),
        ({"each": {"a": "x"}}, "`a` in `each` of it must be a number, but is 'x'."),
    ],
)
def test_what_is_no_number(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_numbers(takes, given, "it")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"name": "tilt", "beta": "1e-1"}, "Tilt(beta=0.1)"),
        ({"name": "constraint", "threshold": "5e-1"}, "Constraint(threshold=0.5)"),
        ({"name": "moments", "mu": {"female": "5e-1"}}, "Moments(mu={'female': 0.5})"),
        ({"name": "tempered", "a": "2e0"}, "Tempered(a=2.0)"),
        ({"name": "log_sigmoid_centered", "gamma": "1e0"}, "LogSigmoidCentered(gamma=1.0, quantile=0.85)"),
        ({"name": "chi_squared", "beta": "1e-1"}, "ChiSquared(beta=0.1)"),
        ({"name": "calibrated", "transform": "best_of_n", "n": "4"}, "n=4"),
        ({"name": "calibrated", "transform": "ctrl_best_of_n", "t": "1e1", "beta": "2e3"}, "t=10.0"),
        ({"name": "product", "factors": [{"name": "tilt", "beta": "1e-1"}]}, "Tilt(beta=0.1)"),
    ],
)
def test_every_target(spec: dict[str, Any], expected: str) -> None:
    assert expected in repr(build_target(spec, 0.3))


def test_a_target_with_a_word_for_a_number() -> None:
    with pytest.raises(ValueError, match="^`beta` of the target 'tilt' must be a number, but is 'warm'.$"):
        build_target({"name": "tilt", "beta": "warm"}, 0.3)
    with pytest.raises(ValueError, match="^The target 'tilt' cannot be made from"):
        build_target({"name": "tilt", "beta": None}, 0.3)


def test_rewards() -> None:
    reward = build_reward({"name": "length_between", "maximum": "2e0", "unit": "characters"})
    assert reward(completions=["ab", "abc"]) == [1.0, 0.0]
    assert build_reward({"name": "max_length", "characters": "3e0"}).__name__ == "max_length_3"
    assert build_reward({"name": "contains_word", "word": "1e5"})(completions=["of 1e5", "of 1"]) == [1.0, 0.0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, which is not on the path: so it is for the script `trl-bayes`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield tmp_path
    sys.modules.pop("mine_of_test_specification", None)


def test_a_target_from_the_working_folder(folder: Path) -> None:
    source = "from trl_bayes.targets import Tilt\nclass Longer(Tilt):\n    pass\nNUMBER = 3\n"
    (folder / "mine_of_test_specification.py").write_text(source)
    spec = {"name": "mine_of_test_specification.Longer", "beta": 0.2}
    assert repr(build_target(spec, 0.3)) == "Longer(beta=0.2)"
    assert import_object("mine_of_test_specification.NUMBER", "thing") == 3


def test_a_module_that_cannot_be_imported_is_one_sentence(folder: Path) -> None:
    (folder / "mine_of_test_specification.py").write_text("1 / 0\n")
    message = r"The target 'mine_of_test_specification.X' cannot be imported \(ZeroDivisionError: division by zero\)."
    with pytest.raises(ValueError, match=message):
        build_target("mine_of_test_specification.X", 0.3)
