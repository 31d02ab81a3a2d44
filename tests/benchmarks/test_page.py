"""The files of a page: strict JSON, Markdown, and a figure where there are curves."""

import json
import math
from pathlib import Path

from trl_bayes.benchmarks.figure import Curve, TrainingCurves
from trl_bayes.benchmarks.page import Page, processor_name
from trl_bayes.benchmarks.section import Findings, SectionArguments


MACHINE = {name: "1.0" for name in ("trl_bayes", "trl", "transformers", "torch", "python")} | {
    "processor": processor_name(),
    "cores": "2",
}


def test_what_was_found_so_far_is_in_the_files(tmp_path: Path) -> None:
    page = Page("bench", tmp_path, MACHINE, seconds=90.0)
    page.add("one", SectionArguments("out"), Findings([1], "## One\n\nfirst\n"))
    page.add("one", SectionArguments("out"), Findings([1, 2], "## One\n\nsecond\n"))
    page.add("two", SectionArguments("out"), Findings({"three": 3}, "## Two"))
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["one"] == [1, 2] and record["two"] == {"three": 3} and record["machine"] == MACHINE
    assert record["arguments"] == {"one": {"output_dir": "out"}, "two": {"output_dir": "out"}}
    text = (tmp_path / "bench.md").read_text()
    assert text.endswith("\n\n## One\n\nsecond\n\n## Two\n") and "; 1.5 minutes in all." in text
    assert MACHINE["processor"] in text and "first" not in text
    assert page.finish() == ["bench.json", "bench.md"] and not (tmp_path / "bench.png").exists()


def test_a_figure_of_all_curves(tmp_path: Path) -> None:
    page = Page("x", tmp_path, MACHINE)
    curves = [TrainingCurves("letters", [Curve("A", [1, 2], [0.1, 0.2], [1.0, 0.5])])]
    page.add("one", SectionArguments(), Findings([], "## One", curves))
    assert "![" not in (tmp_path / "x.md").read_text()
    assert page.finish() == ["x.json", "x.md", "x.png"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "](x.png)" in (tmp_path / "x.md").read_text() and "![" not in page.to_markdown()


def test_json_is_strict(tmp_path: Path) -> None:
    Page("x", tmp_path, MACHINE).add("one", SectionArguments(), Findings([math.inf, {"a": math.nan}], "## One"))
    assert json.loads((tmp_path / "x.json").read_text())["one"] == [None, {"a": None}]
