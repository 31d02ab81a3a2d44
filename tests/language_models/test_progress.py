"""What long work shows: nothing at first, then a line a minute in a file."""

import pytest

from trl_bayes.language_models import progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_file_has_a_line_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with progress.progress_bar("sampling", total=100) as bar:
        monkeypatch.setattr(bar, "_time", clock)
        bar.start_t = bar.last_print_t = clock.now
        for _ in range(10):
            clock.now += 30  # ten completions in half a minute
            bar.update(10)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert 4 <= len(lines) <= 6  # five minutes
    assert lines[0].startswith("sampling: 20 of 100 completions") and lines[0].endswith("04:00 left")


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("sampling", total=10) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""
