"""`trl-bayes sampler-table` with a handful of draws: every method runs, and what it writes is what it prints."""

import json
from pathlib import Path

import pytest

from trl_bayes import cli


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    cli.main(["sampler-table", "--num_samples", "20", "--output_dir", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "samplers.json").read_text(), parse_constant=pytest.fail)
    rows = record["rows"]
    assert record["completions"] == 121 and record["seed"] == 0
    assert {row["family"] for row in rows} >= {"prior", "best of N", "rejection", "quasi-rejection", "MCMC, prefix"}
    for row in rows:
        assert 0 <= row["total_variation"] <= 1 and row["num_draws"] > 0
        assert row["tokens_per_draw"] >= row["generated_per_draw"] * 0.9 >= 0.9
    costs = [row["generated_per_draw"] for row in rows if row["family"] == "quasi-rejection"]
    assert costs == sorted(costs)
    markdown, printed = (tmp_path / "out" / "samplers.md").read_text(), capsys.readouterr().out
    assert markdown.count("\n") == len(rows) + 2
    for row in rows:
        assert f"| {row['settings']} | {row['total_variation']:.3f} |" in markdown and row["family"] in printed


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for flags, sentence in (
        (["--num_samples", "0"], "`num_samples` must be at least 1, got 0."),
        (["--seed", "-1"], "`seed` must be at least 0"),
        (["--output_dir", str(tmp_path / "file" / "x")], "Not a directory"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["sampler-table", *flags])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and sentence in error and "Traceback" not in error
