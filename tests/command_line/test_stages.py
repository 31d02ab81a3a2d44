"""A stage's folder: what is the same run, what is refused, and from where it goes on."""

from dataclasses import replace
from pathlib import Path

import pytest

from trl_bayes.command_line.stages import RECORD, Stage, fingerprint


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage("clone", tmp_path / "clone", {"max_steps": 3, "save_steps": 5}, data="d", previous="p")


def test_is_known_again_and_remembers_what_it_measured(stage: Stage) -> None:
    assert not stage.finished and stage.figures == {}
    stage.check_folder()  # there is none
    stage.begin()
    assert not stage.finished
    stage.finish({"kl": 0.5})
    again = Stage("clone", stage.folder, {"save_steps": 7, "max_steps": 3, "dataset_name": "moved"}, "d", "p")
    again.check_folder()
    assert again.finished and again.figures == {"kl": 0.5} and again.fingerprint == stage.fingerprint
    again.clear()
    assert not stage.finished and not stage.folder.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"max_steps": 4}}, r"with other settings \(max_steps\): set `--overwrite`"),
        ({"data": "other"}, "with other data:"),
        ({"functions": "other"}, "with other reward functions, or other versions of what they use:"),
        ({"previous": "other"}, "with another stage before it:"),
        ({"settings": {"lr": 1}, "data": "other"}, r"with other settings \(lr, max_steps\) and other data:"),
    ],
)
def test_another_run_is_refused(stage: Stage, change: dict[str, object], words: str) -> None:
    stage.begin()
    other = replace(stage, **change)
    with pytest.raises(ValueError, match=words):
        other.check_folder()
    assert other.fingerprint != stage.fingerprint


def test_folders_of_something_else(stage: Stage) -> None:
    stage.folder.mkdir()
    stage.check_folder()  # empty
    (stage.folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="of the stage `clone` holds something else"):
        stage.check_folder()
    (stage.folder / RECORD).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        stage.check_folder()
    with pytest.raises(ValueError, match="is a file"):
        replace(stage, folder=stage.folder / "notes.txt").check_folder()


def test_goes_on_from_the_last_checkpoint_that_is_whole(stage: Stage) -> None:
    assert stage.checkpoint is None
    for number in (2, 10, 9):
        (stage.folder / f"checkpoint-{number}").mkdir(parents=True)
        (stage.folder / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    (stage.folder / "checkpoint-11").mkdir()  # a kill left it so
    assert stage.checkpoint == str(stage.folder / "checkpoint-10")


def test_fingerprint() -> None:
    assert fingerprint([{"a": 1, "b": 2}]) == fingerprint([{"b": 2, "a": 1}]) != fingerprint([{"a": 1, "b": 3}])
