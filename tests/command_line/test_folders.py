"""A folder for results is made, and one that is in use or cannot be written to is refused in one sentence."""

from pathlib import Path

import pytest

from trl_bayes.command_line.folders import prepare_folder


def test_a_folder_is_made_and_left_as_it_is(tmp_path: Path) -> None:
    folder = prepare_folder(str(tmp_path / "a" / "b"), overwrite=False)
    (folder / "file").write_text("x")
    assert prepare_folder(str(folder), overwrite=True) == folder
    assert [file.name for file in folder.iterdir()] == ["file"]
    with pytest.raises(ValueError, match=r"is not empty: name another folder, or set `--overwrite` or `x`.$"):
        prepare_folder(str(folder), overwrite=False, instead=" or `x`")


def test_the_user_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare_folder("~/runs", overwrite=False) == tmp_path / "runs"


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`output_dir=.*file/x` cannot be written to: Not a directory."):
        prepare_folder(str(tmp_path / "file" / "x"), overwrite=True)
    with pytest.raises(ValueError, match=r"`output_dir=.*file` cannot be written to: File exists."):
        prepare_folder(str(tmp_path / "file"), overwrite=True)
