"""`trl-bayes bench`: sections are found in their folder, each has its own flags, and several share a page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_bayes import benchmarks, cli
from trl_bayes.commands import bench


ROOT = Path(__file__).parents[2]
SECTIONS = {"exact", "embedded", "step", "scaling", "samplers", "calibrated", "exploration"}


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence with which the command refuses."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    return error.strip().splitlines()[-1].partition("error: ")[2]


def test_help_lists_sections_and_imports_none() -> None:
    code = (
        "import sys; from trl_bayes.cli import main; main(['bench', '--help']); "
        "print({'torch', 'trl', 'matplotlib'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in SECTIONS:
        assert f"\n  {name} " in run.stdout
    assert run.stdout.splitlines()[-1] == "set()"


def test_sections_are_those_of_the_folder() -> None:
    known = bench.sections()
    assert SECTIONS <= known.keys() and all(known.values())
    assert not {"page", "section", "tiny", "exact-training", "timing"} & known.keys()  # shared code is no section


@pytest.mark.parametrize(
    ("section", "own", "others"),
    [
        ("exact", "--problems", "--rounds"),
        ("step", "--hidden_size", "--problems"),
        ("samplers", "--num_samples", "--quick"),
    ],
)
def test_help_of_a_section_has_its_own_flags(
    section: str, own: str, others: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", section, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and printed.startswith(f"usage: trl-bayes bench {section} ")
    assert own in printed and others not in printed and "(default: runs/bench)" in printed


def test_a_flag_goes_to_each_section_that_has_it() -> None:
    parsed = bench.parse(["exact", "embedded", "step"], ["--quick", "--problems", "balance", "--methods", "DPG"])
    exact, embedded, step = parsed.values()
    assert exact.quick and embedded.quick and step.quick and exact.problems == ["balance"]
    assert exact.methods == embedded.methods == step.methods == ["DPG"]
    default = bench.parse(["calibrated", "step", "scaling"], [])
    assert default["step"].rounds is None and default["scaling"].rounds == 6  # each has a default of its own
    assert bench.parse(["step", "scaling"], ["--rounds", "3"])["step"].rounds == 3


def test_no_section_is_three(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(bench, "run", lambda arguments, pages: ran.append((arguments, pages)))
    monkeypatch.setattr(bench, "pages_of", lambda arguments: {})
    cli.main(["bench", "--seeds", "3"])
    ((arguments, _),) = ran
    assert list(arguments) == ["exact", "embedded", "step"] and arguments["embedded"].seeds == [3]


def test_pages_are_shared_by_what_is_written_together(tmp_path: Path) -> None:
    names = ["exact", "samplers", "embedded", "calibrated"]
    pages = bench.pages_of(bench.parse(names, ["--output_dir", str(tmp_path / "out")]))
    assert [pages[name].name for name in names] == ["bench", "samplers", "bench", "oracle"]
    assert pages["exact"] is pages["embedded"] and (tmp_path / "out").is_dir()


def test_two_sections_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exact and embedded by one trainer, in this process, a step or two each."""
    arguments = ["--problems", "letters", "--methods", "shannon", "--seeds", "3", "--quick", "--num_parallel", "1"]
    cli.main(["bench", "exact", "embedded", *arguments, "--output_dir", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "bench.json").read_text(), parse_constant=pytest.fail)
    assert torch.__version__.startswith(record["machine"]["torch"]) and record["machine"]["processor"]
    limit, exact = record["exact"]
    assert limit["method"] == "noise-free jensen_shannon"
    assert (exact["problem"], exact["seed"], exact["samples"]) == ("letters", 3, 512)
    assert [point["samples"] for point in exact["curve"]] == [0, 256, 512]
    (embedded,) = record["embedded"]["runs"]
    assert embedded["samples"] >= 80 and embedded["evaluation"]["metrics"]["reward"]["trusted"]
    printed, written = capsys.readouterr().out, (tmp_path / "out" / "bench.md").read_text()
    rows = (
        "| letters | FDPGTrainer jensen_shannon | 512 |",
        f"| FDPGTrainer jensen_shannon | {embedded['samples']} |",
    )
    for text in rows:
        assert text in printed and text in written
    assert "![" in written and "![" not in printed and "Step time" not in written
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_example_of_contributing_is_a_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One new file, as it stands there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("**A section of the benchmark.**")[2]
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example
    (tmp_path / "task_sizes.py").write_text(example.group(1), encoding="utf-8")
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    assert bench.sections()["task-sizes"] == "How many completions each exact task has."
    cli.main(["bench", "task-sizes", "--tasks", "letters", "hard-20k", "--output_dir", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert record["task-sizes"] == {"letters": 1_555, "hard-20k": 19_608}
    assert "| hard-20k | 19,608 |" in capsys.readouterr().out


def test_bench_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which the command would set
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, sentence in (
        (["exacte"], "There is no section 'exacte' (did you mean 'exact'?): the sections are ablation, calibrated, "),
        (["exact", "tiny"], "There is no section 'tiny': the sections are ablation, calibrated,"),
        (["exact", "--rounds", "3"], "unrecognized arguments: --rounds 3"),
        (["exact", "--seeds", "x"], "argument --seeds: invalid int value: 'x'"),
        (["--problems", "leters"], "'leters' is not one of letters, bigrams, balance, hard-20k, hard-100k (did you"),
        (["--methods", "PPO"], "no trainer's name has 'PPO' in it: they are TRL GRPOTrainer,"),
        (["--device", "cuda"], "`device=cuda`, but torch finds no CUDA GPU: set `--device cpu`."),
        (["--output_dir", str(tmp_path / "file" / "x")], "cannot be written to: Not a directory."),
    ):
        assert sentence in refusal(capsys, *argv)
