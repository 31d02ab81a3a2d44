"""A folder for results is made, and one that cannot be is refused in one sentence."""

from pathlib import Path

import pytest

from trl_bayes.command_line.folders import writable_folder


def test_a_folder_is_made_and_left_as_it_is(tmp_path: Path) -> None:
    folder = writable_folder(str(tmp_path / "a" / "b"))
    (folder / "file").write_text("x")
    assert writable_folder(str(folder)) == folder and [file.name for file in folder.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`output_dir=.*file/x` cannot be written to: Not a directory."):
        writable_folder(str(tmp_path / "file" / "x"))
    with pytest.raises(ValueError, match=r"`output_dir=.*file` cannot be written to: File exists."):
        writable_folder(str(tmp_path / "file"))
