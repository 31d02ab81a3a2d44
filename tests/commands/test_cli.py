"""The dispatcher: commands are found in their folder, help is quick, and an unknown command is refused."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.trainers import TRAINERS
from trl_bayes import __version__, cli


ROOT = Path(__file__).parents[2]
TRAINING = {name.replace("_", "-") for name in TRAINERS}


def test_commands_are_those_of_the_folder_and_take_argv() -> None:
    names = cli.commands()
    assert TRAINING | {"env", "bench"} <= names.keys()
    assert not {"training", "parser", "launch", "--init--"} & names.keys()  # shared code is no command
    for name, summary in names.items():
        assert summary, name
    for name in ("bench", "env", "f_dpg"):
        main = importlib.import_module(f"trl_bayes.commands.{name}").main
        assert inspect.signature(main).parameters["argv"].default is None


def test_a_new_file_is_a_new_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_words.py").write_text('"""Say something.\n\nMore."""\n\ndef main(argv=None): ...\n')
    (tmp_path / "shared.py").write_text("def run(): ...\n")
    monkeypatch.setattr(cli, "_FOLDER", tmp_path)
    assert cli.commands() == {"two-words": "Say something."}


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(argv)
    printed = capsys.readouterr().out
    for name in TRAINING:
        assert f"\n  {name} " in printed


def test_help_imports_neither_torch_nor_trl() -> None:
    code = "import sys; from trl_bayes.cli import main; main(['--help']); print({'torch', 'trl'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"


def test_python_m() -> None:
    """As a process, because what is tested is `__main__` and the exit code."""
    command = [sys.executable, "-m", "trl_bayes", "f-dgp"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 2
    assert run.stderr.startswith(
        "trl-bayes: error: There is no command 'f-dgp' (did you mean 'f-dpg'?): use one of bench, "
    )


def test_unknown_command_far_from_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["zzzzzz"])
    assert stopped.value.code == 2
    assert "use one of bench," in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


def test_env_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["env"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["trl_bayes"] == __version__
    assert torch.__version__.startswith(lines["torch"])  # the metadata of a CUDA build need not name its CUDA
    assert {"trl", "transformers", "accelerate", "datasets", "python", "platform", "devices", "cores"} <= lines.keys()


def test_env_of_a_package_that_is_missing() -> None:
    from trl_bayes.commands.env import installed_version

    assert installed_version("surely-not-a-package") == "not installed"
