"""What the site has that is not in `docs/`: refusals from the source, notebooks, the changelog, figures, papers."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import notebooks  # noqa: E402 - a hook is loaded by its path, so its neighbors have to be found first
import refusals  # noqa: E402


FIGURES = {
    "images/reward_against_kl.png": "recipes/python_syntax/reward_against_kl.png",
    "images/smollm2_json.png": "recipes/smollm2/json/results.png",
}


def on_files(files: Any, config: Any) -> Any:
    """Adds pages and figures."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changelog))
    for notebook in sorted((ROOT / "recipes" / "notebooks").glob("*.ipynb")):
        page, pictures = notebooks.as_markdown(notebook)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    for paper in sorted((ROOT / "recipes" / "papers").glob("*/README.md")):
        name = paper.parent.name
        table = (paper.parent / "table.md").read_text(encoding="utf-8")
        page = (
            paper.read_text(encoding="utf-8")
            .replace("(figure.png)", f"({name}.png)")
            .replace("(table.md)", "(#all-numbers)")
        )
        files.append(File.generated(config, f"papers/{name}.md", content=f"{page}\n## All numbers\n\n{table}"))
        files.append(File.generated(config, f"papers/{name}.png", content=(paper.parent / "figure.png").read_bytes()))
    for name, figure in FIGURES.items():
        files.append(File.generated(config, name, content=(ROOT / figure).read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the refusals where a page asks for them, and leads from a paper's figure to its page in the site."""
    markdown = re.sub(r"\(\.\./recipes/papers/(\w+)/figure\.png\)", r"(papers/\1.png)", markdown)
    markdown = re.sub(r"\(\.\./recipes/papers/(\w+)/README\.md\)", r"(papers/\1.md)", markdown)
    markdown = re.sub(r"^\|.*\|$", lambda row: whole_numbers(row[0]), markdown, flags=re.MULTILINE)
    return markdown.replace("<!-- refusals -->", refusals.as_markdown())


def whole_numbers(row: str) -> str:
    """A row of a table, in which no line breaks before an error, a unit or a number in brackets."""
    return re.sub(r"(?<=\d) (?=[±%?]|\(\.?\d)|(?<=±) (?=[\d.])", "\N{NO-BREAK SPACE}", row)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """TRL's docstrings write a name as [`~module.Name`]: shown as code, by its last part."""
    if not page.file.src_uri.startswith("api/"):
        return html
    html = re.sub(
        r"(defaults to [^<]*|optional)</code>, default:\s*<code>.*?</code>", r"\1</code>", html, flags=re.DOTALL
    )
    html = re.sub(r"\[<code>~?(?:[\w.]*\.)?(\w+)</code>\](?!\()", r"<code>\1</code>", html)
    return re.sub(r"<code>([^<]*`[^<]*)</code>", lambda found: f"<code>{plain_type(found[1])}</code>", html)


def plain_type(text: str) -> str:
    """A type as a docstring of TRL's writes it, ([`~module.Name`], *optional*), without the marks."""
    text = re.sub(r"\[?`~?(?:[\w.]*\.)?([^`.]*)`\]?", r"\1", text)
    return text.replace("*optional*", "optional")
