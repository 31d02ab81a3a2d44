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


def text_of(node: ast.expr) -> str:
    """The text of a string, with `…` for values that are put in; empty for anything else."""
    match node:
        case ast.Constant(value=str() as value):
            return value
        case ast.JoinedStr(values=values):
            return "".join(text_of(value) if isinstance(value, ast.Constant) else "…" for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left) + text_of(right)
        case ast.IfExp(body=body):
            return text_of(body)
        case ast.FormattedValue() | ast.Name() | ast.Call() | ast.Attribute():
            return "…"
    return ""


def refusals_of(module: Path) -> Iterator[Refusal]:
    """Those of a module, in its order."""
    name = module.relative_to(PACKAGE).as_posix()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args):
            continue
        is_error = isinstance(node, ast.Raise) and call.func.id in ERRORS
        if is_error or call.func.id == "Inexact":
            sentence = re.sub(r"…(\s*…)+", "…", text_of(call.args[0]))
            reason = "" if is_error else text_of(call.args[1])
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
                lines.append(f'    *With `inexact_settings="warn"`:* {escaped(refusal.reason)}')
    return "\n".join(lines)
