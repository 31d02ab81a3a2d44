"""Targets from configuration: every form a user may write, and every message for what they may not."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_bayes.targets
from trl_bayes.targets import ChiSquared, Constraint, Product, Target, Tilt, build_target, worst_of_n
from trl_bayes.targets.build import target_names


class Mine(Target):
    """A user's own target, by its dotted path."""

    def __init__(self, slope: float, rewards: str | None = None):
        super().__init__(rewards)
        self.slope = slope

    def log_potential(self, rewards: torch.Tensor) -> torch.Tensor:
        return self.slope * self.select(rewards)[:, 0]

    def settings(self) -> dict[str, Any]:
        return {"slope": self.slope, **super().settings()}


DOTTED = "trl_bayes.targets.constraint.Constraint"
GIVEN = Constraint(rewards="short")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, "Tilt(beta=0.3)"),
        ("tilt", "Tilt(beta=0.3)"),
        ("constraint", "Constraint(threshold=0.5)"),
        ({"name": "tilt"}, "Tilt(beta=0.3)"),
        ({"name": "tilt", "beta": 2, "rewards": "style"}, "Tilt(beta=2.0, rewards=['style'])"),
        (
            {"name": "constraint", "threshold": 1, "rewards": ["a", "b"]},
            "Constraint(threshold=1.0, rewards=['a', 'b'])",
        ),
        ({"name": "moments", "mu": {"female": 0.5, "science": 0.4}}, "Moments(mu={'female': 0.5, 'science': 0.4})"),
        (
            {"name": "calibrated", "transform": "best_of_n", "n": 5},
            "Calibrated(transform=best_of_n(n=5), beta=0.25)",
        ),
        (
            {"name": "calibrated", "transform": "best_of_n", "n": 5, "beta": 2, "rewards": "quality"},
            "Calibrated(transform=best_of_n(n=5), beta=2.0, rewards=['quality'])",
        ),
        (
            {"name": "calibrated", "transform": "ctrl_worst_of_n", "t": 5},
            "Calibrated(transform=ctrl_worst_of_n(t=5.0), beta=0.3)",
        ),
        (
            {"name": "calibrated", "transform": "identity", "beta": 0.5},
            "Calibrated(transform=identity(), beta=0.5)",
        ),
        ({"name": "calibrated", "transform": worst_of_n(3)}, "Calibrated(transform=worst_of_n(n=3), beta=0.5)"),
        ("log_sigmoid_centered", "LogSigmoidCentered(gamma=1.0, quantile=0.85)"),
        (
            {"name": "log_sigmoid_centered", "gamma": 0.5, "quantile": 0.5, "rewards": ["a", "b"]},
            "LogSigmoidCentered(gamma=0.5, quantile=0.5, rewards=['a', 'b'])",
        ),
        ({"name": "tempered", "a": 2}, "Tempered(a=2.0)"),
        ("chi_squared", "ChiSquared(beta=0.3)"),
        ({"name": "chi_squared", "beta": 2, "rewards": "a"}, "ChiSquared(beta=2.0, rewards=['a'])"),
        (DOTTED, "Constraint(threshold=0.5)"),
        ({"name": DOTTED, "threshold": 2}, "Constraint(threshold=2.0)"),
        (GIVEN, "Constraint(threshold=0.5, rewards=['short'])"),
        (
            # As YAML reads `{name: product, factors: [...]}` of a recipe
            {
                "name": "product",
                "factors": [{"name": "constraint", "rewards": "compiles"}, {"name": "tilt", "beta": 0.5}, "tilt"],
            },
            "Product(factors=[Constraint(threshold=0.5, rewards=['compiles']), Tilt(beta=0.5), Tilt(beta=0.3)])",
        ),
        (
            {
                "name": "product",
                "factors": [
                    "chi_squared",
                    {"name": "calibrated", "transform": "identity"},
                    {"name": "tempered", "a": 2},
                ],
            },
            "Product(factors=[ChiSquared(beta=0.3), Calibrated(transform=identity(), beta=0.3), Tempered(a=2.0)])",
        ),
        (
            {"name": "product", "factors": [{"name": "product", "factors": [GIVEN]}, DOTTED]},
            "Product(factors=[Product(factors=[Constraint(threshold=0.5, rewards=['short'])]), "
            "Constraint(threshold=0.5)])",
        ),
    ],
)
def test_specification(spec: Any, expected: str) -> None:
    assert repr(build_target(spec, beta=0.3)) == expected


def test_a_target_is_taken_as_it_is() -> None:
    assert build_target(GIVEN, beta=0.3) is GIVEN
    product = build_target({"name": "product", "factors": [GIVEN]}, beta=0.3)
    assert isinstance(product, Product)
    assert product.factors[0] is GIVEN


def test_classes() -> None:
    for spec, target_class in ((None, Tilt), ("constraint", Constraint), (DOTTED, Constraint)):
        assert type(build_target(spec, beta=0.3)) is target_class


def test_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_bayes.targets.base.Mine", Mine, raising=False)  # any importable module will do
    path = "trl_bayes.targets.base.Mine"
    assert (
        repr(build_target({"name": path, "slope": 3.0, "rewards": "a"}, beta=0.3)) == "Mine(slope=3.0, rewards=['a'])"
    )
    with pytest.raises(
        ValueError, match=re.escape("takes ['slope', 'rewards']: missing a required argument: 'slope'.")
    ):
        build_target(path, beta=0.3)


def test_a_target_file_is_all_that_a_recipe_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the package of targets is found by the name of its class, in a product too; with the run's beta."""
    (tmp_path / "signed_square.py").write_text(
        "from trl_bayes.targets import Target, Tilt\n\n\n"
        "class SignedSquare(Target):\n"
        "    def __init__(self, beta: float, rewards: str | None = None):\n"
        "        super().__init__(rewards)\n"
        "        self.beta = beta\n\n"
        "    def log_potential(self, rewards):\n"
        "        return (rewards[:, 0] * rewards[:, 0].abs()) / self.beta\n\n"
        "    def settings(self):\n"
        "        return {'beta': self.beta}\n"
    )
    monkeypatch.setattr(trl_bayes.targets, "__path__", [*trl_bayes.targets.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "trl_bayes.targets.signed_square", None)  # put back as it was: absent
    del sys.modules["trl_bayes.targets.signed_square"]
    monkeypatch.delattr(trl_bayes.targets, "signed_square", raising=False)
    target = build_target("signed_square", beta=0.5)
    assert repr(target) == "SignedSquare(beta=0.5)"
    assert target(torch.tensor([[-2.0]])).tolist() == [-8.0]
    assert repr(build_target({"name": "product", "factors": [{"name": "signed_square", "beta": 2.0}]})) == (
        "Product(factors=[SignedSquare(beta=2.0)])"
    )
    with pytest.raises(ValueError, match="did you mean 'signed_square'"):
        build_target("signed_squares")


def test_names_are_those_of_the_classes() -> None:
    assert list(target_names()) == [
        "calibrated",
        "chi_squared",
        "constraint",
        "log_sigmoid_centered",
        "moments",
        "product",
        "tempered",
        "tilt",
    ]
    for target_class in target_names().values():  # whatever a recipe can name can be imported
        assert getattr(trl_bayes.targets, target_class.__name__) is target_class


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, "Tilt(beta=1.0)"),
        ("chi_squared", "ChiSquared(beta=1.0)"),
        ({"name": "calibrated", "transform": "identity"}, "Calibrated(transform=identity(), beta=1.0)"),
        ({"name": "calibrated", "transform": "best_of_n", "n": 3}, "Calibrated(transform=best_of_n(n=3), beta=0.5)"),
        ({"name": "tilt", "beta": 0.2}, "Tilt(beta=0.2)"),
    ],
)
def test_default_temperature(spec: Any, expected: str) -> None:
    """Without one of the run's, as in pure RL, it is the target's own."""
    assert repr(build_target(spec)) == repr(build_target(spec, None)) == expected


@pytest.mark.parametrize("spec", [None, "chi_squared", {"name": "calibrated", "transform": "identity"}])
def test_a_temperature_of_0_is_none(spec: Any) -> None:
    with pytest.raises(ValueError, match="positive finite `beta`"):
        build_target(spec, beta=0.0)


def test_a_class_says_its_own_default_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChiSquared, "default_beta", 3.0)
    assert repr(build_target("chi_squared")) == "ChiSquared(beta=3.0)"
    assert repr(build_target("tilt")) == "Tilt(beta=1.0)"


def test_a_specification_is_not_changed() -> None:
    spec = {"name": "product", "factors": [{"name": "tilt"}]}
    build_target(spec, beta=0.3)
    assert spec == {"name": "product", "factors": [{"name": "tilt"}]}


@pytest.mark.parametrize("spec", [3, ["tilt"], {}, {"beta": 0.1}, {"name": 3}, {"name": None}])
def test_not_a_specification(spec: Any) -> None:
    with pytest.raises(ValueError) as error:
        build_target(spec, beta=0.3)
    assert str(error.value) == (
        f"`target` must be a name, a mapping with `name`, a dotted path or a `Target`, got {spec!r}."
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tild", "Unknown target 'tild' (did you mean 'tilt'?): use one of ["),
        ("xyz", "] or the dotted path of a Target class."),
        ({"name": "constrant"}, "(did you mean 'constraint'?)"),
        (
            "no_such_package.Mine",
            "The target 'no_such_package.Mine' cannot be imported (ModuleNotFoundError: No module",
        ),
        (
            "trl_bayes.targets.NoSuch",
            "The target 'trl_bayes.targets.NoSuch' cannot be imported (AttributeError: module 'trl_bayes.targets' has",
        ),
        ("math.pi", "The target 'math.pi' is not a concrete subclass of `trl_bayes.targets.Target`."),
        ("pathlib.Path", "The target 'pathlib.Path' is not a concrete subclass of `trl_bayes.targets.Target`."),
        (
            {"name": "tilt", "betta": 0.1},
            "The target 'tilt' takes ['beta', 'rewards']: got an unexpected keyword argument 'betta'.",
        ),
        (
            {"name": DOTTED, "beta": 0.1},
            f"The target '{DOTTED}' takes ['rewards', 'threshold']: got an unexpected keyword argument 'beta'.",
        ),
        ("moments", "The target 'moments' takes ['mu']: missing a required argument: 'mu'."),
        ({"name": "moments", "mu": 0.5}, "`Moments` needs a mapping of feature names to moments"),
        ("calibrated", "The target 'calibrated' takes ['transform', 'beta', 'rewards']: missing a required argument"),
        ({"name": "calibrated", "transform": "best"}, "Unknown transform 'best': use one of ['best_of_n', "),
        ({"name": "calibrated", "transform": 3}, "Unknown transform 3: use one of ["),
        (
            {"name": "calibrated", "transform": "best_of_n"},
            "The transform 'best_of_n' takes ['n']: missing a required argument: 'n'.",
        ),
        (
            {"name": "calibrated", "transform": "best_of_n", "n": 4, "t": 5},
            "The transform 'best_of_n' takes ['n']: got an unexpected keyword argument 't'.",
        ),
        (
            {"name": "calibrated", "transform": worst_of_n(3), "n": 4},
            "The transform worst_of_n(n=3) is already made, so ['n'] cannot be set.",
        ),
        ("tempered", "The target 'tempered' takes ['a']: missing a required argument: 'a'."),
        ({"name": "tilt", "beta": -1.0}, "`Tilt` needs a positive finite `beta`"),
        ("product", "`Product` needs at least one factor."),
        ({"name": "product", "factors": ["tilt", "tild"]}, "Unknown target 'tild'"),
        ({"name": "product", "factors": [{"beta": 1.0}]}, "`target` must be a name, a mapping with `name`"),
        (
            {"name": "product", "factors": ["tilt"], "beta": 0.1},
            "The target 'product' takes ['factors']: got an unexpected keyword argument 'beta'.",
        ),
    ],
)
def test_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        build_target(spec, beta=0.3)
    assert message in str(error.value)


def test_an_unlike_name_gets_no_suggestion() -> None:
    with pytest.raises(ValueError) as error:
        build_target("xyz", beta=0.3)
    assert "did you mean" not in str(error.value)
    assert all(repr(name) in str(error.value) for name in ("constraint", "product", "tilt"))


@pytest.mark.parametrize("path", ["trl_bayes.targets.Target", "..Mine", ".Mine"])
def test_paths_that_lead_to_no_target_class(path: str) -> None:
    with pytest.raises(ValueError, match=f"^The target '{re.escape(path)}' "):
        build_target(path, beta=0.3)
