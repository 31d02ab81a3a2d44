"""The package's files with the first line of each one's docstring, as CONTRIBUTING shows them.

`python -m tests.helpers.tree` writes them there again.
"""

import ast
import re
from pathlib import Path

import trl_bayes


PACKAGE = Path(trl_bayes.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"
_ROOMS = (
    "spelling.py divergences.py groups.py statistics rewards language_models prior targets partitions.py estimators "
    "trainers samplers evaluation benchmarks command_line commands cli.py assets"
).split()
_SECTION = re.compile(r"(?<=<!-- files -->\n```text\n).*?(?=```)", re.DOTALL)


def tree() -> str:
    """A line for each room and file, from the ground up."""
    lines = []
    rooms = {path.name for path in PACKAGE.glob("[!_]*") if path.is_dir() or path.suffix == ".py"}
    if missing := rooms.symmetric_difference(_ROOMS):
        raise ValueError(f"`_ROOMS` in tests/helpers/tree.py must name each room once: look at {sorted(missing)}.")
    for name in _ROOMS:
        path = PACKAGE / name
        lines.append(_line(name + "/" * path.is_dir(), path / "__init__.py" if path.is_dir() else path))
        for file in sorted(path.glob("*.py")) if path.is_dir() else []:
            if file.name != "__init__.py":
                lines.append(_line(f"  {file.name}", file))
    return "\n".join(lines) + "\n"


def _line(name: str, file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return f"{name:<28}{' '.join(docstring.split(chr(10) * 2)[0].split())}".rstrip()


def shown() -> str:
    """The tree as CONTRIBUTING has it."""
    found = _SECTION.search(CONTRIBUTING.read_text(encoding="utf-8"))
    assert found is not None
    return found[0]


if __name__ == "__main__":
    CONTRIBUTING.write_text(_SECTION.sub(lambda _: tree(), CONTRIBUTING.read_text(encoding="utf-8")), encoding="utf-8")
