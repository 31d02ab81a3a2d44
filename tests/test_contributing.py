"""The examples of CONTRIBUTING.md: each adds to a copy of the repository in at most two files, and its test passes."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).parents[1]
COPIED = ("trl_bayes", "tests", "pyproject.toml", "README.md")
SECTIONS = ("A target", "A divergence", "An estimator", "A trainer", "A sampler", "A command")
MOST_FILES = 2

# The name of a file on a line of its own, and then its contents or what changes in it
_BLOCK = re.compile(r"^`(?P<file>[\w./]+)`\n\n```(?P<kind>python|diff)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_TESTS = re.compile(r'^make test-fast PYTEST_ARGS="(.*)"$', re.MULTILINE)


class Example(NamedTuple):
    blocks: list[re.Match[str]]
    tests: list[str]  # arguments of pytest

    @property
    def files(self) -> set[str]:
        """Files of the package that it makes or changes."""
        return {block["file"] for block in self.blocks if not block["file"].startswith("tests/")}


def examples() -> dict[str, Example]:
    """The sections under "How to add" that have an example."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    chapter = text.partition("\n## How to add\n")[2].partition("\n## ")[0]
    found = {}
    for section in chapter.split("\n### ")[1:]:
        title, _, body = section.partition("\n")
        found[title] = Example(list(_BLOCK.finditer(body)), _TESTS.findall(body))
    return {title: example for title, example in found.items() if example.blocks}


EXAMPLES = examples()


def patched(text: str, diff: str) -> str:
    """The text with the hunks of a diff, which are separated by `@@` and have no line numbers."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines()
        assert {line[:1] for line in lines} <= {" ", "+", "-"}, f"a line that is no part of a diff:\n{hunk}"
        before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in signs) for signs in (" -", " +"))
        assert text.count(before) == 1, f"these lines are there {text.count(before)} times:\n{before}"
        text = text.replace(before, after)
    return text


def apply(block: re.Match[str], root: Path) -> None:
    file = root / block["file"]
    if block["kind"] == "diff":
        file.write_text(patched(file.read_text(encoding="utf-8"), block["text"]), encoding="utf-8")
    else:
        assert not file.exists(), f"{block['file']} is there already"
        file.write_text(block["text"], encoding="utf-8")


def test_patch() -> None:
    assert patched("a\nb\nc\nd\n", " a\n+x\n b\n@@\n-d\n+e\n") == "a\nx\nb\nc\ne\n"
    with pytest.raises(AssertionError, match="0 times"):
        patched("a\n", "-b\n")
    with pytest.raises(AssertionError, match="2 times"):
        patched("a\na\n", "-a\n")


def test_every_kind_of_addition_has_an_example() -> None:
    assert set(SECTIONS) <= EXAMPLES.keys()


@pytest.mark.parametrize("title", EXAMPLES)
def test_it_takes_at_most_two_files_and_its_test(title: str) -> None:
    example = EXAMPLES[title]
    assert len(example.files) <= MOST_FILES
    assert len(example.blocks) - len(example.files) == 1 and len(example.tests) == 1


@pytest.mark.slow
def test_the_examples_pass_their_tests_and_the_linter(tmp_path: Path) -> None:
    """All in one copy and one process, for imports take most of the time."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        else:
            shutil.copy(source, tmp_path / name)
    for example in EXAMPLES.values():
        for block in example.blocks:
            apply(block, tmp_path)
    runs = [["-q", "-p", "no:cacheprovider", *shlex.split(example.tests[0])] for example in EXAMPLES.values()]
    program = f"import pytest, sys; sys.exit(max(int(pytest.main(arguments)) for arguments in {runs!r}))"
    command(tmp_path, "-c", program)
    files = [block["file"] for example in EXAMPLES.values() for block in example.blocks]
    command(tmp_path, "-m", "ruff", "check", *files)
    command(tmp_path, "-m", "ruff", "format", "--check", *files)


def command(root: Path, *arguments: str) -> None:
    """Runs Python in the copy; fails with what it printed."""
    finished = subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
