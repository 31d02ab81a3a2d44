"""Write the lines of one module of the standard library as demonstrations for the embedded prior.

    python recipes/demonstrations/lines_of_a_module.py --module turtle --output_file runs/demonstrations/lines.jsonl

A demonstration is a line that is one simple statement, as the prior was trained on:
`{"prompt": "self.", "completion": "_update()"}` where the line begins with one of the prior's prompts, and with an
empty prompt where it does not. A line that occurs twice in the module is a demonstration twice.
"""

import argparse
import ast
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from trl_bayes.assets import embedded_path


PRIOR = "embedded:python_lines"
MOST_TOKENS = 11  # and the end of the line: 12 is what the other recipes of this prior generate
STATEMENTS = (
    ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Raise, ast.Delete, ast.Assert, ast.Import,
    ast.ImportFrom, ast.Global, ast.Nonlocal, ast.Pass, ast.Break, ast.Continue,
)  # fmt: skip


def lines_of(module: str) -> Iterator[str]:
    """Lines with one simple statement and nothing besides, in the order of the syntax tree."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise SystemExit(f"There is no module {module!r} with a Python file.")
    text = Path(found.origin).read_text(encoding="utf-8")
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, STATEMENTS) or node.lineno != node.end_lineno:
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.JoinedStr):
            continue
        line = lines[node.lineno - 1]
        if line.isascii() and line.strip() == line[node.col_offset : node.end_col_offset]:
            yield line.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", default="turtle", help="of the standard library")
    parser.add_argument("--output_file", default="runs/demonstrations/lines.jsonl", help="JSON lines")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(embedded_path(PRIOR))
    known = Path(embedded_path(PRIOR, "prompts.jsonl")).read_text(encoding="utf-8").splitlines()
    prompts = sorted((json.loads(row)["prompt"] for row in known), key=len, reverse=True)  # the empty one fits all
    rows = []
    for line in lines_of(args.module):
        if len(tokenizer(line)["input_ids"]) - 1 > MOST_TOKENS:
            continue
        prompt = next(prompt for prompt in prompts if line.startswith(prompt))
        rows.append({"prompt": prompt, "completion": line.removeprefix(prompt)})
    file = Path(args.output_file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} demonstrations in {file}")


if __name__ == "__main__":
    main()
