"""The quickstart: what it refuses, what it keeps after an interruption, and one whole run."""

import json
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_bayes.command_line import quickstart
from trl_bayes.command_line.quickstart import RUNS, QuickstartArguments, Run, prepare_quickstart
from trl_bayes.commands.quickstart import main


def begun(folder: Path, **settings: Any) -> Path:
    """A folder in which a quickstart was begun."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quickstart.json").write_text(json.dumps({"quick": False, "seed": 0, **settings}))
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence with which the quickstart refuses."""
    with pytest.raises(SystemExit) as exit_:
        main(list(argv))
    assert exit_.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_refuses_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (begun(tmp_path) / "metrics.json").write_text("{}")
    message = refusal(capsys, "--output_dir", str(tmp_path))
    assert "holds a finished quickstart: set --overwrite" in message


def test_refuses_a_folder_with_other_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    assert "is not empty: set --overwrite" in refusal(capsys, "--output_dir", str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "do not touch"


def test_refuses_to_mix_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(tmp_path, seed=1)
    assert "begun with other arguments" in refusal(capsys, "--output_dir", str(tmp_path))


def test_refuses_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file: name a folder" in refusal(capsys, "--output_dir", str(tmp_path / "file"))


def test_refuses_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:  # the tests may run as root, who may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = refusal(capsys, "--output_dir", str(tmp_path / "new"))
    assert message.endswith("cannot be written to: Permission denied.")


def test_refuses_no_training_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`num_parallel=0` trains nothing" in refusal(capsys, "--num_parallel", "0")


def test_an_interrupted_run_keeps_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path)
    (folder / "dpg").mkdir()
    (folder / "dpg" / "trained.json").write_text('{"seconds": 1.0}')
    args = QuickstartArguments(output_dir=str(folder))
    trained: list[str] = []
    monkeypatch.setattr(quickstart, "train", lambda run, *rest: trained.append(run.name))
    quickstart.train_all(args, prepare_quickstart(args), quickstart.Console(quiet=True))
    assert sorted(trained) == ["f_dpg", "kl_rl", "pure_rl"]


def test_after_a_failed_training_no_other_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun_runs: list[str] = []

    def fail(run: Run, *rest: Any) -> None:
        begun_runs.append(run.name)
        time.sleep(0.5 * (len(begun_runs) - 1))
        raise RuntimeError(run.name)

    monkeypatch.setattr(quickstart, "train", fail)
    args = QuickstartArguments(output_dir=str(begun(tmp_path)), num_parallel=1)
    with pytest.raises(RuntimeError, match=RUNS[0].name):
        quickstart.train_all(args, prepare_quickstart(args), quickstart.Console(quiet=True))
    assert len(begun_runs) <= 2  # the second may have begun before the first was known to have failed


def test_overwrite_begins_again(tmp_path: Path) -> None:
    folder = begun(tmp_path, seed=1)
    (folder / "metrics.json").write_text("{}")
    (folder / "thesis.txt").write_text("do not touch")
    (folder / "dpg").mkdir()
    (folder / "dpg" / "trained.json").write_text('{"seconds": 1.0}')
    prepare_quickstart(QuickstartArguments(output_dir=str(folder), overwrite=True))
    assert sorted(path.name for path in folder.iterdir()) == ["quickstart.json", "thesis.txt"]


def test_a_failed_training_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(yaml.safe_dump({**RUNS[2].settings, "beta": -1.0}))
    monkeypatch.setattr(Run, "recipe", recipe)
    with pytest.raises(RuntimeError, match=r"DPG failed(.|\n)*not a temperature"):
        quickstart.train(RUNS[2], QuickstartArguments(), tmp_path / "dpg", lambda done: None)
    assert not (tmp_path / "dpg" / "trained.json").exists()


def test_steps_are_read_from_the_bar(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        "Loading weights: 100%|##| 29/29 [00:00<00:00]\r  3%|#  | 5/150 [00:03<01:30]\r  4%|#  | 6/150 [00:04"
    )
    assert quickstart._steps_done(log, 150) == 6
    assert quickstart._steps_done(log, 24) == 0


def test_all_runs_have_the_same_budget_and_problem() -> None:
    shared = ("model_name_or_path", "dataset_name", "reward_funcs", "max_completion_length", "num_generations")
    shared += ("per_device_train_batch_size", "max_steps", "save_steps")
    assert len({json.dumps([run.settings[key] for key in shared]) for run in RUNS}) == 1


@pytest.mark.slow
def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "quickstart"
    main(["--quick", "--output_dir", str(folder)])
    table = capsys.readouterr().out
    page = (folder / "report.html").read_text(encoding="utf-8")
    rows = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["rows"]
    assert list(rows) == ["posterior", "prior", *(run.name for run in RUNS)]
    for run in RUNS:
        assert run.label.split(",")[0] in table
        assert run.label in page
        assert (folder / run.name / "model.safetensors").stat().st_mode & stat.S_IRUSR
        assert not list((folder / run.name).glob("checkpoint-*"))  # measured, then removed
    prior, exact = rows["prior"]["metrics"], rows["posterior"]["metrics"]
    assert exact["reward"]["value"] == 1.0
    assert prior["kl_prior"]["value"] == 0.0
    # The posterior's distance to the prior is -log Z, and Z the share of the prior's lines that parse
    assert exact["kl_prior"]["value"] == pytest.approx(-exact["log_z"]["value"])
    for run in RUNS[1:]:
        assert rows[run.name]["metrics"]["kl_prior"]["value"] > 0
