"""What all tests of this folder take."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.trainers import ANY_TARGET


pytest.register_assert_rewrite("tests.trainers.drop_in.runs")

from tests.trainers.drop_in.runs import Make  # noqa: E402


@pytest.fixture
def make(tiny_models: Any, tmp_path: Path) -> Make:
    return Make(tiny_models, tmp_path)


@pytest.fixture(params=ANY_TARGET)
def kind(request: pytest.FixtureRequest) -> str:
    """A test that takes this runs with each of our trainers that take any target."""
    return request.param
