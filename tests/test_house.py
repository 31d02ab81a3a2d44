"""House rules that no linter knows: files hold one idea, functions fit on a screen, named trainers are thin.

The limits are those of CONTRIBUTING.md. Which room may import which is checked by import-linter, in `make lint`.
"""

import ast
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import trl_bayes
from tests.helpers import tree
from tests.helpers.trainers import TRAINERS


PACKAGE = Path(trl_bayes.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# All lines, whatever is on them
MOST_LINES = 450
MOST_LINES_OF = {"trainers/posterior_trainer.py": 350}
# Lines of code: without docstrings, comments, blank lines and citations
MOST_LINES_OF_A_FUNCTION = 50
MOST_LINES_OF_A_TRAINER = 79

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def lines_with_code(file: Path) -> set[int]:
    """Numbers of the lines that have more on them than a comment."""
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with file.open("rb") as source:
        tokens = [token for token in tokenize.tokenize(source.readline) if token.type != tokenize.ENCODING]
    spans = ((token.start[0], token.end[0]) for token in tokens if token.type not in empty)
    return {line for first, last in spans for line in range(first, last + 1)}


def span(node: ast.stmt) -> set[int]:
    assert node.end_lineno is not None
    return set(range(node.lineno, node.end_lineno + 1))


def documentation(tree: ast.AST) -> set[int]:
    """Lines of strings that stand alone (docstrings, also of attributes) and of the paper that a trainer cites."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        is_string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_string and isinstance(node.value.value, str):
            lines |= span(node)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "_paper" for t in node.targets):
            lines |= span(node)
    return lines


def functions(tree: ast.AST) -> Iterator[tuple[str, Function]]:
    """Functions and methods with their dotted names; what is defined inside a function is part of it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{name}", method) for name, method in functions(node))


def code_of(file: Path) -> tuple[ast.Module, set[int]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return tree, lines_with_code(file) - documentation(tree)


def test_modules_hold_one_idea() -> None:
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in MODULES}
    assert MOST_LINES_OF.keys() <= lengths.keys()
    too_long = {name: n for name, n in lengths.items() if n > MOST_LINES_OF.get(name, MOST_LINES)}
    assert not too_long, f"over {MOST_LINES} lines, or their own limit {MOST_LINES_OF}: split them by idea"


def test_functions_fit_on_a_screen() -> None:
    too_long = {}
    for file in MODULES:
        tree, code = code_of(file)
        for name, function in functions(tree):
            length = len(span(function) & code)
            if length > MOST_LINES_OF_A_FUNCTION:
                too_long[f"{name_of(file)}: {name}"] = length
    assert not too_long, f"over {MOST_LINES_OF_A_FUNCTION} lines of code"


def test_every_trainer_has_a_row_in_the_table_of_the_tests() -> None:
    public = {name for name in trl_bayes.__all__ if name.endswith("Trainer")}
    assert {row.trainer.__name__ for row in TRAINERS.values()} == public


@pytest.mark.parametrize("name", TRAINERS)
def test_named_trainers_are_thin(name: str) -> None:
    # Documentation, configuration, and which estimator it picks
    module = TRAINERS[name].trainer.__module__
    file = PACKAGE.parent / (module.replace(".", "/") + ".py")
    _, code = code_of(file)
    assert len(code) <= MOST_LINES_OF_A_TRAINER, f"{name_of(file)} has {len(code)} lines of code"


def test_what_counts_as_code(tmp_path: Path) -> None:
    source = '''"""A module."""

# A comment
import a  # with a comment


class B:
    """Cited."""

    _paper = {
        "title": "T",
    }
    c = 1
    """Said of `c`."""

    def d(
        self,
    ) -> str:
        """Said
        of `d`."""

        def inner() -> None: ...

        return """one
        two"""
'''
    (tmp_path / "b.py").write_text(source)
    tree, code = code_of(tmp_path / "b.py")
    assert sorted(code) == [4, 7, 13, 16, 17, 18, 22, 24, 25]
    assert [name for name, _ in functions(tree)] == ["B.d"]


def test_contributing_shows_every_file() -> None:
    assert tree.shown() == tree.tree(), "run `python -m tests.helpers.tree`"
