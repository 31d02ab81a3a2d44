"""A folder for results is made, and one that is in use or cannot be written to is refused in one sentence."""

from pathlib import Path

import pytest

from trl_bayes.command_line.folders import gone_if_unused, prepare_folder


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


def test_what_was_made_for_nothing_is_gone(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for used in (False, True):
        folder = tmp_path / "runs" / "a" / str(used)
        with pytest.raises(RuntimeError), gone_if_unused(str(folder)):
            prepare_folder(str(folder), overwrite=False)
            if used:
                (folder / "file").write_text("x")
            raise RuntimeError
        assert folder.exists() == used and (tmp_path / "runs").exists()
        assert (tmp_path / "runs" / "a").exists() == used
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError), gone_if_unused(str(tmp_path / "empty")):
        raise RuntimeError
    assert (tmp_path / "empty").exists()
