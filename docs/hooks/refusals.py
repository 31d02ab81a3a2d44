"""Every refusal of the package, read from its source: the sentences of `raise ValueError(...)` and their like."""

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


PACKAGE = Path(__file__).parents[2] / "trl_bayes"
ERRORS = {"ValueError", "TypeError", "ImportError", "FileNotFoundError", "OSError", "RuntimeError"}
ERRORS |= {"LogPotentialError", "SamplingError", "PromptError", "PriorSamplesError"}
# Where a user meets them, in this order; what is left out refuses nothing that a user writes
SECTIONS = {
    "Settings under which the result would not be the posterior": ["trainers/exactness.py"],
    "Trainers and their configuration": ["trainers"],
    "Targets": ["targets", "partitions.py", "divergences.py"],
    "Samples of the prior": ["prior"],
    "Rewards": ["rewards"],
    "Models, prompts and settings of sampling": ["language_models", "assets"],
    "Samplers": ["samplers"],
    "Evaluation and reports": ["evaluation", "statistics"],
    "Command line": ["command_line", "commands", "cli.py"],
}


class Refusal(NamedTuple):
    """A sentence with `…` for what it quotes, and where it is said."""

    sentence: str
    module: str
    reason: str = ""


def text_of(node: ast.expr, constants: dict[str, str]) -> str:
    """The text of a string, with `…` for values that are put in; of two texts the first."""
    match node:
        case ast.Constant(value=str() as value):
            return value
        case ast.Name(id=name):
            return constants.get(name, "…")
        case ast.FormattedValue(value=value):
            return text_of(value, constants)
        case ast.JoinedStr(values=values):
            return "".join(text_of(value, constants) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left, constants) + text_of(right, constants)
        case ast.IfExp(body=body):
            return text_of(body, constants)
    return "…"


def constants_of(tree: ast.Module) -> dict[str, str]:
    """Texts that a module names."""
    named = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    pairs = [(target, node.value) for node in named for target in node.targets]
    return {
        target.id: value.value
        for target, value in pairs
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str)
    }


def refusals_of(module: Path) -> Iterator[Refusal]:
    """Those of a module, in its order."""
    name = module.relative_to(PACKAGE).as_posix()
    tree = ast.parse(module.read_text(encoding="utf-8"))
    constants = constants_of(tree)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Raise | ast.Call)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args):
            continue
        is_error = isinstance(node, ast.Raise) and call.func.id in ERRORS
        if is_error or call.func.id == "Inexact":
            sentence = re.sub(r"…+", "…", text_of(call.args[0], constants))
            reason = "" if is_error else re.sub(r"…+", "…", text_of(call.args[1], constants))
            if len(re.findall(r"\w+", sentence)) > 3:  # one that hands on another's message says nothing itself
                yield Refusal(sentence, name, reason)


def all_refusals() -> dict[str, list[Refusal]]:
    """Refusals by section; a module is in the first that names it."""
    found: dict[str, list[Refusal]] = {}
    seen: set[Path] = set()
    for section, places in SECTIONS.items():
        paths = [path for place in places for path in sorted([PACKAGE / place, *(PACKAGE / place).rglob("*.py")])]
        modules = [path for path in paths if path.is_file() and path not in seen]
        seen.update(modules)
        found[section] = list(dict.fromkeys(refusal for module in modules for refusal in refusals_of(module)))
    return found


def escaped(sentence: str) -> str:
    """As Markdown: what is not code must not be read as HTML or emphasis."""
    parts = sentence.split("`")
    plain = [re.sub(r"([*_\[\]\\])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2]]
    return "`".join(text for pair in zip(plain, [*parts[1::2], ""], strict=False) for text in pair).rstrip("`")


def as_markdown() -> str:
    """The list, section by section."""
    lines: list[str] = []
    for section, refusals in all_refusals().items():
        lines += ["", f"## {section}", ""]
        for refusal in refusals:
            lines.append(f"- {escaped(refusal.sentence)}")
            if refusal.reason:
                lines.append(f'    - with `inexact_settings="warn"`: {escaped(refusal.reason)}')
    return "\n".join(lines)
