"""The page: HTML that loads nothing, escapes what models write, and shows every number that it is given."""

import base64
import json
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_bayes.commands.report import main
from trl_bayes.evaluation import figures
from trl_bayes.evaluation.evaluate import Evaluation
from trl_bayes.evaluation.files import merge_reports, read_report
from trl_bayes.evaluation.page import write_report
from trl_bayes.evaluation.report import CurvePoint, Report, RunRecord, SampleLine, choose_lines
from trl_bayes.evaluation.tables import format_number
from trl_bayes.language_models.completions import Completions
from trl_bayes.statistics.estimate import Estimate


VOID = {"meta", "img", "br", "link", "input", "hr"}
METRICS = ("reward", "kl_prior", "forward_kl", "reverse_kl_inside", "mass_outside", "total_variation", "entropy")
DIVERSITY = ("distinct_1", "distinct_2", "distinct_3", "self_bleu", "share_distinct")


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects texts, attributes and images."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def evaluation(offset: float, **metrics: Estimate) -> Evaluation:
    """A different number for each metric."""
    values = {name: Estimate(offset + k / 100, 0.0012) for k, name in enumerate((*METRICS, *DIVERSITY))}
    return Evaluation("x", {**values, **metrics}, 2000, 3000, 8000, 2000)


def run(name: str, offset: float, **metrics: Estimate) -> RunRecord:
    curve = [
        CurvePoint(step, step * 64, {metric: Estimate(offset + step / 9, 0.01) for metric in METRICS})
        for step in (0, 5, 10)
    ]
    lines = [SampleLine("x = ", "f(1)", True), SampleLine("return ", "(", False)]
    settings = {"learning_rate": 3e-4, "name": name}
    return RunRecord(name, f"run {name}", "the posterior", evaluation(offset, **metrics), curve, lines, settings, 61.4)


def report(*runs: RunRecord) -> Report:
    return Report(
        "A title",
        "What was done.",
        {"prior": "small"},
        RunRecord("posterior", "exact posterior", evaluation=evaluation(0.1)),
        RunRecord("prior", "prior", evaluation=evaluation(0.2)),
        list(runs),
        hard=True,
        reward_label="share that parse",
        reward_is_share=True,
        settings={"torch": "9.9"},
    )


def written(made: Report, folder: Path) -> Page:
    return Page(write_report(made, folder).read_text(encoding="utf-8"))


def test_every_number_is_there(tmp_path: Path) -> None:
    made = report(run("a", 0.3), run("b", 0.5))
    page = written(made, tmp_path)
    for row in made.rows:
        assert row.label in page.text
        assert row.evaluation is not None
        for name, estimate in row.evaluation.metrics.items():
            percent = name in ("reward", "mass_outside", "share_distinct")
            assert format_number(estimate.value, estimate.standard_error, percent) in page.text, name
    for text in ("A title", "What was done.", "share that parse", "0.0003", "61", "9.9", "2,000", "3,000", "8,000"):
        assert text in page.text


def test_settings_are_side_by_side_where_runs_differ(tmp_path: Path) -> None:
    first, second = run("a", 0.3), run("b", 0.5)
    second.settings["beta"] = 0.25
    text = written(report(first, second), tmp_path).text
    differing, shared = text.split("where they differ")[-1].split("Shared by all")
    assert "name a b" in differing and "beta – 0.25" in differing and "learning_rate" not in differing
    assert "learning_rate 0.0003 torch 9.9" in shared


@pytest.mark.parametrize(("kl", "enlarged"), [(0.3, False), (3.0, True)])
def test_the_surroundings_of_the_posterior_are_enlarged_if_a_run_is_far(
    tmp_path: Path, kl: float, enlarged: bool
) -> None:
    text = written(report(run("a", 0.3), run("far", 0.5, kl_prior=Estimate(kl, 0.01))), tmp_path).text
    assert ("enlarged" in text) == enlarged


def test_nothing_is_loaded_and_no_script_runs(tmp_path: Path) -> None:
    page = written(report(run("a", 0.3)), tmp_path)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes)
        if "src" in attributes:
            assert (attributes["src"] or "").startswith("data:image/png;base64,")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(", text)


def test_figures_are_in_the_page_and_beside_it(tmp_path: Path) -> None:
    page = written(report(run("a", 0.3)), tmp_path)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    files = [tmp_path / "figures" / f"{name}.png" for name in ("reward_against_kl", "learning_curves")]
    assert len(images) == 2 and all(image["alt"] for image in images)
    for image, file in zip(images, files, strict=True):
        png = file.read_bytes()
        assert base64.b64decode((image["src"] or "").partition(",")[2]) == png
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", png[16:20])[0] > 800  # pixels across


def test_a_panel_without_a_point_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of a training has no entropy and no KL(pi||p) to show; a run that was only evaluated has no curve."""
    monkeypatch.setattr(figures, "png", lambda draw: draw())
    level = Estimate(0.5, 0.1)
    trained = figures.Series("trained", [0, 100], [{"reward": Estimate(value, 0.1)} for value in (0.2, 0.4)])
    panels = [figures.Panel(name, name, "nats", level) for name in ("forward_kl", "entropy", "reward")]
    drawn: Any = figures.learning_curves_figure([figures.Series("evaluated", [], []), trained], panels)
    assert [axes.get_title(loc="left") for axes in drawn.axes if axes.get_visible()] == ["reward"]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["trained", "exact posterior"]


def test_what_models_write_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert('$x^$')</script>"
    made = report(run("a", 0.3))
    made.title = made.intro = made.runs[0].label = made.reward_label = bad
    made.problem, made.settings, made.runs[0].settings = {bad: bad}, {bad: bad}, {bad: [bad]}
    odd = "tab\tnew\nline \x00 \ud800 end"
    made.runs[0].samples = [SampleLine(bad, bad, True), SampleLine("", odd, False), SampleLine("", "", None)]
    page = written(made, tmp_path)
    assert all(tag != "script" for tag, _ in page.tags)
    assert page.text.count(bad) > 8
    assert "tab⇥new⏎line ␀ ? end" in page.text and "(nothing)" in page.text


def test_invalid_samples_are_marked_not_by_color_alone(tmp_path: Path) -> None:
    page = written(report(run("a", 0.3)), tmp_path)
    marks = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("class") == "mark"]
    assert marks == ["valid", "not valid"]
    assert "✓" in page.texts and "✗" in page.texts
    without = run("a", 0.3)
    without.samples = [SampleLine("x = ", "f(1)")]
    unmarked = written(report(without), tmp_path)
    assert "✗" not in unmarked.text and "not chosen" in unmarked.text  # nor is a mark explained


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, None, 0.0, -0.2, 1e9])
def test_any_number(tmp_path: Path, value: float | None) -> None:
    number = Estimate(math.nan if value is None else value)
    made = report(run("a", 0.3), run("b", 0.4))
    for point in made.runs[0].curve:
        point.metrics.update(dict.fromkeys(METRICS, number))
    made.runs[0].evaluation = None if value is None else evaluation(0, **dict.fromkeys(METRICS, Estimate(value)))
    page = written(made, tmp_path)
    expected = {math.inf: "∞", -math.inf: "−∞", None: "–", 0.0: "0", -0.2: "−0.2", 1e9: "1e+09"}.get(value, "–")
    assert expected in page.text
    assert read_report(tmp_path).runs[0].curve[0].step == 0


def test_one_number_alone(tmp_path: Path) -> None:
    """A run whose every point is the same, and a posterior of which nothing is known."""
    one = RunRecord("a", "a", evaluation=Evaluation("a", {"reward": Estimate(1.0), "kl_prior": Estimate(0.0)}))
    page = written(Report("t", "i", runs=[one], posterior=RunRecord("p", "p")), tmp_path)
    assert "mean reward" in page.text


def test_no_runs(tmp_path: Path) -> None:
    page = written(Report("Empty", "Nothing was run."), tmp_path)
    assert "There are no runs in this report." in page.text
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "exact posterior" in written(report(), tmp_path / "references").text


def test_untrusted_numbers_are_not_printed(tmp_path: Path) -> None:
    doubtful = Estimate(7.654, 0.3, trusted=False, note="only 3 samples")
    page = written(report(run("a", 0.3, forward_kl=doubtful)), tmp_path)
    assert "7.7" not in page.text and "7.65" not in page.text
    assert "not reliable" in page.text and "only 3 samples" in page.text


def test_a_note_is_printed_once(tmp_path: Path) -> None:
    noted = Estimate(math.inf, note="mass outside")
    made = report(run("a", 0.3, reverse_kl=noted), run("b", 0.4, reverse_kl=noted))
    made.hard = False
    assert written(made, tmp_path).text.count("mass outside") == 1


def test_the_page_can_be_made_again(tmp_path: Path) -> None:
    made = report(run("a", 0.3, forward_kl=Estimate(math.inf)))
    made.runs[0].settings["odd"] = {"x": math.nan, "path": Path("y")}
    write_report(made, tmp_path / "first")
    text = (tmp_path / "first" / "report.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=pytest.fail)
    again = write_report(read_report(tmp_path / "first"), tmp_path / "second")
    assert again.read_bytes() == (tmp_path / "first" / "report.html").read_bytes()


def test_reports_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no report at"):
        read_report(tmp_path / "nowhere")
    for text in ("{", "[]", '{"title": 1}', '{"title": "a", "intro": "b", "runs": [3]}', '{"surprise": 1}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match="is not a report written by"):
            read_report(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.73123, 0.0123), "0.731 ± 0.012"),
        ((-0.5, 0.25), "−0.50 ± 0.25"),
        ((0.975, 0.0042, True), "97.50 ± 0.42 %"),
        ((123.4, 31.0), "123 ± 31"),
        ((0.5, math.nan), "0.5"),
        ((0.5, 0.0), "0.5"),
        ((math.inf, math.nan), "∞"),
        ((math.nan,), "–"),
        ((0.1, 1e-30), "0.1"),
        ((1.0, 2e-6, True), "100.0000 ± 0.0002 %"),
    ],
)
def test_format(arguments: tuple[float, ...], text: str) -> None:
    assert format_number(*arguments) == text


def test_choose_lines() -> None:
    samples = Completions(
        prompts=["a", [{"role": "user", "content": "b?"}]],
        prompt_ids=[[0], [1]],
        prompt_index=torch.tensor([0, 0, 0, 1, 1]),
        completion_ids=[[i] for i in range(5)],
        texts=list("vwxyz"),
        ended=torch.ones(5, dtype=torch.bool),
    )
    lines = choose_lines(samples, torch.tensor([1, 0, 1, 1, 0]).bool(), number=4)
    assert [(line.prompt, line.completion, line.valid) for line in lines] == [
        ("a", "v", True),
        ("a", "w", False),
        ("b? → ", "y", True),
        ("b? → ", "z", False),
    ]
    assert choose_lines(samples)[0].valid is None and len(choose_lines(samples)) == 5
    assert choose_lines(samples.select(torch.arange(0))) == []


def test_diversity_of_different_numbers_is_pointed_out(tmp_path: Path) -> None:
    made = report(run("a", 0.3))
    assert "not the same for all rows" not in written(made, tmp_path).text
    assert made.runs[0].evaluation is not None
    made.runs[0].evaluation.num_diversity_samples = 77
    text = written(made, tmp_path).text
    assert "is not the same for all rows here" in text and "run a 77." in text


# --- several reports, and the command --------------------------------------------------------------------------------


def test_merged_reports(tmp_path: Path) -> None:
    one, two = report(run("a", 0.3)), report(run("a", 0.5), run("b", 0.6))
    merged = merge_reports({"x": one, "y": two})
    assert [(row.name, row.label) for row in merged.runs] == [
        ("x/a", "run a (x)"),
        ("y/a", "run a (y)"),
        ("y/b", "run b (y)"),
    ]
    assert merged.settings == {"torch (x)": "9.9", "torch (y)": "9.9"}
    assert "run b (y)" in written(merged, tmp_path).text
    assert merge_reports({"x": one}) == one
    with pytest.raises(ValueError, match="no reports to merge"):
        merge_reports({})


def test_reports_about_several_problems_are_parts_of_a_page(tmp_path: Path) -> None:
    one, two, three = report(run("a", 0.3)), report(run("b", 0.5)), report(run("c", 0.7))
    two.problem, two.title = {"prior": "another"}, "Another problem"
    merged = merge_reports({"x": one, "y": two, "z": three})
    assert [row.label for row in merged.runs] == ["run a (x)", "run c (z)"]
    assert [[row.label for row in part.runs] for part in merged.parts] == [["run b"]]
    page = written(merged, tmp_path)
    assert "Another problem" in page.text and "another" in page.text
    numbers = [
        format_number(e.value, e.standard_error)
        for part in (merged, two)
        for e in part.runs[0].evaluation.metrics.values()
    ]  # type: ignore[union-attr]
    assert numbers[0] not in numbers[12:] and numbers[1] in page.text and numbers[-2] in page.text
    assert sum(attributes.get("class") == "reference" for _, attributes in page.tags) == 4  # two tables each
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 4
    assert len(list((tmp_path / "figures").iterdir())) == 4
    again = read_report(tmp_path)
    assert again == merged
    with_more = merge_reports({"page": again, "more": two})
    assert [row.label for row in with_more.parts[0].runs] == ["run b (page, part 2)", "run b (more)"]


def training_log(folder: Path, entries: list[dict[str, Any]]) -> str:
    folder.mkdir()
    state = {"global_step": 20, "log_history": entries}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return str(folder)


def test_a_step_without_any_reward_is_left_out(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [
        {"step": 1, "reward": None, "posterior/kl_prior": None},
        {"step": 2, "reward": 1.0},
    ]
    (alone,) = read_report(training_log(tmp_path / "dpg", entries)).runs
    assert [point.step for point in alone.curve] == [2]


def test_the_log_of_a_training_is_a_run(tmp_path: Path) -> None:
    entries = [
        {"step": 10, "reward": 0.25, "posterior/kl_prior": 0.125, "posterior/forward_kl": 0.5, "loss": 1.0},
        {"step": 20, "reward": 0.75, "posterior/kl_prior": 0.375},
        {"step": 20, "train_runtime": 8.0, "train_samples_per_second": 40.0},
    ]
    folder = training_log(tmp_path / "dpg", entries)
    (alone,) = read_report(folder).runs
    assert [(point.step, point.samples) for point in alone.curve] == [(10, 160), (20, 320)]
    assert alone.seconds == 8 and alone.metric("reward") == Estimate(0.75, note=alone.evaluation.note)  # type: ignore[union-attr]
    known = report(run("a", 0.3))
    merged = merge_reports({"x": read_report(folder), "y": known})
    assert merged.problem == known.problem and merged.hard and merged.reward_label == known.reward_label
    assert [row.label for row in merged.runs] == ["run a (y)", "dpg (x)"]
    page = written(merged, tmp_path / "page")
    assert "as logged in training" in page.text and "0.375" in page.text
    written(merge_reports({"x": read_report(folder), "z": read_report(folder)}), tmp_path / "logs")
    nothing = training_log(tmp_path / "sft", [{"step": 10, "loss": 1.0}])
    with pytest.raises(ValueError, match="is not a report written by"):
        read_report(nothing)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [str(tmp_path / name) for name in ("x", "y")]
    for folder in folders:
        write_report(report(run("a", 0.3)), folder)
    out = ["--output_dir", str(tmp_path / "out")]
    main([*folders, *out, "--title", "Both"])
    page = Path(capsys.readouterr().out.strip())
    assert page == tmp_path / "out" / "report.html"
    assert "Both" in Page(page.read_text(encoding="utf-8")).text
    (tmp_path / "file").write_text("")
    for arguments, sentence in (
        ([*folders, *out], "report.html exists: give another --output_dir, or --overwrite."),
        ([str(tmp_path / "z")], "There is no report at"),
        ([folders[0], "--output_dir", str(tmp_path / "file" / "out")], "Not a directory"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        error = capsys.readouterr().err
        assert error.startswith("trl-bayes report: error: ") and sentence in error and error.count("\n") == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    main(["~/x", *out, "--overwrite"])
