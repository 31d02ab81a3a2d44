"""What the Markdown files name is there: modules and names that they import, commands, sections of `bench`."""

import importlib
import re
from pathlib import Path

import pytest

from trl_bayes import cli
from trl_bayes.commands import bench


ROOT = Path(__file__).parents[1]
# The examples of CONTRIBUTING add files, and `test_contributing.py` runs them
DOCUMENTS = [
    file
    for file in sorted(ROOT.rglob("*.md"))
    if file.name != "CONTRIBUTING.md" and not {".venv", "runs", "build"} & set(file.relative_to(ROOT).parts)
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_imported_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for module, names in re.findall(r"^from (trl_bayes[\w.]*) import (\([^)]*\)|.*)", text, re.MULTILINE):
        for name in re.findall(r"\w+", re.sub(r" as \w+|#.*", "", names)):
            where = importlib.import_module(module)
            assert getattr(where, name, None) is not None or importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_and_sections_are_there(document: Path) -> None:
    """Where a line or a piece of code begins with `trl-bayes`."""
    text = document.read_text(encoding="utf-8")
    sections = {*bench.sections(), "task-sizes"}  # the last is an example
    for command, words in re.findall(r"(?:`|^ *)trl-bayes ([a-z][a-z_-]*)((?: [a-z][a-z_-]*)*)", text, re.MULTILINE):
        assert command in cli.commands(), f"trl-bayes {command}"
        if command == "bench":
            assert set(words.split()) <= sections, f"trl-bayes bench{words}"
