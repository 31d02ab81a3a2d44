"""What the tests of several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_bayes import cli


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """
    Runs a command with a recipe that must be refused with exit code 2 and one line, and returns what that line says.

    An entry of the recipe that is `...` is left out.
    """

    def run(command: str, recipe: dict[str, Any], *flags: str) -> str:
        given = {key: value for key, value in recipe.items() if value is not ...}
        Path("recipe.yaml").write_text(yaml.safe_dump(given))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--config", "recipe.yaml", *flags])
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        lines = [line for line in error.splitlines() if line.startswith("trl-bayes")]
        assert len(lines) == 1 and error.rstrip().endswith(lines[0]) and "Traceback" not in error, error
        return lines[0].removeprefix(f"trl-bayes {command}: error: ")

    return run
