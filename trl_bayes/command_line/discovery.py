"""Commands and sections of the benchmark are found by reading files, so that listing them imports none."""

import ast
from collections.abc import Iterable
from pathlib import Path


def modules_with(function: str, folders: Iterable[str | Path]) -> dict[str, str]:
    """
    The modules that define a function.

    Args:
        function (`str`): its name.
        folders (`list[str]`): where modules are.

    Returns:
        `dict[str, str]`: names of the modules, with dashes and in alphabetical order in each folder, and the first
        lines of their docstrings.
    """
    found = {}
    for file in (file for folder in folders for file in sorted(Path(folder).glob("*.py"))):
        module = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == function for node in module.body):
            found[file.stem.replace("_", "-")] = (ast.get_docstring(module) or "").partition("\n")[0]
    return found
