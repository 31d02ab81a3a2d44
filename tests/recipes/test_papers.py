"""The papers' figures: every script runs on a minimal budget and writes what the page says; bad input is refused."""

import json
import re
from pathlib import Path

import pytest

from trl_bayes import cli
from trl_bayes.benchmarks.paper import mean_and_spread, scripts
from trl_bayes.samplers import kl_of_best_of_n


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "papers"
RECORDED = {  # what each table.json holds, besides seeds and seconds
    "best_of_n": {"rows", "memoryless"},
    "decoding": {"realigned", "proxy"},
    "distribution_matching": {"sizes", "variances", "courses"},
    "f_dpg": {"runs", "sizes"},
    "inf_align": {"budgets", "posteriors", "policies", "trainers", "heavy_tail"},
    "inference": {"courses", "exact"},
    "over_optimization": {"points", "fits"},
}
NAMES = sorted(scripts())


def test_there_is_one_of_each_paper() -> None:
    assert sorted(RECORDED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shown_is_there(name: str) -> None:
    """The files of each folder, with five seeds; the README and the page show the figure and the table's numbers."""
    record = json.loads((FOLDER / name / "table.json").read_text(), parse_constant=pytest.fail)
    assert set(record) == {"seeds", "seconds"} | RECORDED[name] and record["seeds"] == [0, 1, 2, 3, 4]
    assert (FOLDER / name / "figure.png").read_bytes().startswith(b"\x89PNG")
    readme = (FOLDER / name / "README.md").read_text()
    assert "(figure.png)" in readme and f"--figures {name}" in readme
    page = (ROOT / "docs" / "papers.md").read_text()
    assert f"../recipes/papers/{name}/figure.png" in page and f"../recipes/papers/{name}/README.md" in page


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_a_readme_are_in_its_table(name: str) -> None:
    """With two digits or more; a table that is made again leaves no stale text behind."""
    readme = re.sub(r"\[[^\]]*\]\([^)]*\)", "", (FOLDER / name / "README.md").read_text())  # papers have numbers too
    table = [float(number) for number in decimals((FOLDER / name / "table.md").read_text())]
    quoted = [number for number in decimals(readme) if len(number.partition(".")[2]) >= 2]
    assert quoted
    for number in quoted:
        rounding = 0.5 * 10 ** -len(number.partition(".")[2]) + 1e-9
        assert any(abs(value - float(number)) <= rounding for value in table), f"{number} is not in table.md"


def decimals(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])\d*\.\d+", text)


def test_inf_align_is_as_close_as_promised() -> None:
    """What is committed: policies within .02 of their posteriors in every column and seed."""
    record = json.loads((FOLDER / "inf_align" / "table.json").read_text())
    place = record["budgets"].index(0.5)
    for name, policies in record["policies"].items():
        for policy, posterior in zip(policies, record["posteriors"][name], strict=True):
            assert policy == pytest.approx(posterior[place], abs=0.02)


def test_best_of_n_has_the_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as a user runs it, with one seed; what is printed is what is written."""
    flags = ["--quick", "--seeds", "3", "--num_parallel", "1", "--output_dir", str(tmp_path)]
    cli.main(["bench", "papers", "--figures", "best_of_n", *flags])
    record = json.loads((tmp_path / "best_of_n" / "table.json").read_text(), parse_constant=pytest.fail)
    for row in record["rows"]["no ties"][0]:
        assert row["kl"] == pytest.approx(row["formula"], abs=0.005) and row["kl"] <= row["formula"]
        assert row["win_rate"] == pytest.approx(row["n"] / (row["n"] + 1), abs=0.002)
        assert row["win_rate"] <= row["win_rate_tilt_rank"] + 1e-6
    for rows in record["rows"].values():
        assert all(row["kl"] <= row["formula"] + 1e-9 for row in rows[0])
    for rows in record["memoryless"].values():  # no law has more reward at its distance than the tilt
        assert all(row["kl"] <= kl_of_best_of_n(row["n"]) and -1e-6 < row["gap"] < 0.02 for row in rows[0])
    assert (tmp_path / "best_of_n" / "table.md").read_text().strip() in capsys.readouterr().out


@pytest.mark.slow
def test_the_others_run(tmp_path: Path) -> None:
    """With one seed and two steps of training, where there is any."""
    names = [name for name in NAMES if name != "best_of_n"]
    flags = ["--quick", "--seeds", "0", "--num_parallel", "1", "--output_dir", str(tmp_path)]
    cli.main(["bench", "papers", "--figures", *names, *flags])
    records = {name: json.loads((tmp_path / name / "table.json").read_text()) for name in names}
    assert all((tmp_path / name / "figure.png").stat().st_size > 10_000 for name in names)
    # The policy of beta = 1 is its own realignment; a small model's log-ratio is closer than nothing
    rows = {row["beta"]: row for row in records["decoding"]["realigned"]["#a - #b/2"][0]}
    assert rows[1.0]["realigned"] == pytest.approx(0, abs=1e-9) and rows[0.5]["realigned"] < rows[0.5]["policy"] / 10
    assert all(row["proxy"] < row["prior"] for row in records["decoding"]["proxy"]["unrelated"][0])
    # Exact posteriors are as far from the prior as they were asked to be
    budgets = records["inf_align"]["budgets"]
    for runs in records["inf_align"]["posteriors"].values():
        assert [row["kl"] for row in runs[0]] == pytest.approx(budgets, rel=0.05)
    # A baseline takes variance away, and a larger group too
    for where in records["distribution_matching"]["variances"].values():
        with_baseline, without = where[0]["DPG, with baseline"], where[0]["DPG, no baseline"]
        assert all(a < b for a, b in zip(with_baseline, without, strict=True)) and without[-1] < without[0] / 10
    points = records["over_optimization"]["points"]["normal noise"]["best of N"][0]
    assert [point["proxy"] for point in points] == sorted(point["proxy"] for point in points)


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, sentence in (
        (["--figures", "f_gdp"], "did you mean 'f_dpg'?"),
        (["--seeds", "-1"], "`seeds` needs numbers between 0"),
        (["--num_parallel", "0"], "`num_parallel=0` runs nothing"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", "papers", *flags])
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_texts() -> None:
    assert mean_and_spread([1.0, 3.0], 1) == "2.0 ± 1.4" and mean_and_spread([1.0]) == "1.000 ± 0.000"
