"""A notebook as a page: its text, its code and the outputs that it was kept with."""

import base64
import json
from pathlib import Path
from typing import Any


def as_markdown(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """The page, and its pictures by file name."""
    lines: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source.replace(".ipynb)", ".md)"), ""]
            continue
        lines += ["```python", source, "```", ""]
        for output in cell["outputs"]:
            data: dict[str, Any] = output.get("data", {})
            if "image/png" in data:
                name = f"{notebook.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                lines += [f"![Output of the cell]({name})", ""]
                continue
            text = "".join(output.get("text", data.get("text/plain", [])))
            if text.strip():
                lines += ["```text", text.rstrip(), "```", ""]
    return "\n".join(lines), pictures
