"""The package's metadata, versions and files agree: a light check; `make package` builds the wheel and tries it."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.version import Version

import trl_bayes


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
METADATA = PROJECT["project"]


def requirements(names: list[str]) -> list[Requirement]:
    return [Requirement(name) for name in names]


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert METADATA["version"] == trl_bayes.__version__ == str(citation["version"]) == changelog[0]


def test_the_tested_versions_are_allowed() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {name.lower().replace("-", "_"): version for name, version in pins.items()}
    extras = [name for names in METADATA["optional-dependencies"].values() for name in names]
    for needed in requirements([*METADATA["dependencies"], *extras, *PROJECT["build-system"]["requires"]]):
        name = needed.name.lower().replace("-", "_")
        if name == "trl_bayes" or needed.extras:
            continue  # itself, or TRL with an extra of its own
        assert name in pins, f"constraints.txt does not pin {needed.name}"
        assert needed.specifier.contains(pins[name]), f"{needed} does not allow {pins[name]}"


def test_the_table_of_versions_in_the_readme() -> None:
    pins = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    table = re.findall(r"^\| (\w+) \| (.*?) \| (\S+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    rows = {name: (supported, tested) for name, supported, tested in table}
    lowest = {
        need.name: min(re.findall(r">=([\d.]+)", str(need.specifier)))
        for need in requirements(METADATA["dependencies"])
    }
    assert {name: rows[name][1] for name in ("TRL", "torch", "transformers")} == {
        "TRL": pins["trl"], "torch": pins["torch"], "transformers": pins["transformers"],
    }  # fmt: skip
    for name in ("TRL", "torch", "transformers"):
        assert rows[name][0].startswith(lowest[name.lower()])
    assert rows["Python"][0].split()[0] == METADATA["requires-python"].removeprefix(">=")
    workflow = (ROOT / ".github/workflows/tests.yml").read_text()
    assert '["3.11", "3.12", "3.13"]' in workflow and rows["Python"][0] == "3.11 to 3.13"


def test_the_lowest_versions_are_tried() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    rows = {row["name"]: row["packages"] for row in jobs["versions"]["strategy"]["matrix"]["include"]}
    pins = dict(pin.split("==") for pin in rows["lowest"].split())
    assert set(pins) == {"trl", "transformers", "accelerate", "datasets"}
    for need in requirements(METADATA["dependencies"]):
        lowest = next((Version(bound.version) for bound in need.specifier if bound.operator == ">="), None)
        assert need.name not in pins or Version(pins[need.name]) == lowest, need


def test_the_wheel_has_what_commands_read_and_no_results() -> None:
    built = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    shipped = [*(ROOT / "recipes").rglob("*.*"), *(ROOT / "accelerate_configs").glob("*.yaml")]
    read = [path for path in shipped if path.suffix in (".yaml", ".py", ".jsonl") and "__pycache__" not in path.parts]
    assert len(read) > 60 and {f"trl_bayes/{path.relative_to(ROOT)}" for path in read} <= built
    assert {"trl_bayes/py.typed", "trl_bayes/cli.py"} <= built and (ROOT / METADATA["readme"]).is_file()
    assert not [name for name in built if name.endswith((".png", ".ipynb")) or "/table." in name]
    assert all(name.startswith("trl_bayes/") for name in built)
    script = importlib.metadata.EntryPoint("trl-bayes", METADATA["scripts"]["trl-bayes"], "console_scripts")
    assert callable(script.load())


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_run_what_is_there(workflow: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for line in runs:
        for words in re.findall(r"^make ([a-z ]+)", line):
            assert set(words.split()) <= targets, line
        for path in re.findall(r"tests/\S+", line):
            assert (ROOT / path).exists(), line
    for line in runs:
        for extra in re.findall(r"\.\[(\w+)\]", line):
            assert extra in METADATA["optional-dependencies"]


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[bp]*.yml")), ids=lambda path: path.stem
)
def test_issues_ask_for_the_environment(form: Path) -> None:
    fields = {field["id"]: field for field in yaml.safe_load(form.read_text())["body"]}
    assert "trl-bayes env" in fields["environment"]["attributes"]["label"]
