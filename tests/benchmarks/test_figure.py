"""The benchmark's figure: a PNG whatever the numbers are, and lines where they belong."""

import math

import pytest
from matplotlib.figure import Figure

from trl_bayes.benchmarks import figure
from trl_bayes.benchmarks.figure import Curve, TrainingCurves, divergence_figure


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn."""
    figures: list[Figure] = []
    render = figure.png

    def keep(draw):
        return render(lambda: figures.append(draw()) or figures[-1])

    monkeypatch.setattr(figure, "png", keep)
    return figures


def test_a_line_is_the_mean_over_seeds_in_both_columns(drawn: list[Figure]) -> None:
    curves = [
        Curve("A", [0, 10, 100], [0.0, 1.0, 10.0], [2.0, 0.5, 0.1]),
        Curve("A", [0, 10, 100], [0.0, 3.0, 30.0], [2.0, 1.5, 0.3]),
        Curve("B", [0, 10, 100], [0.0, 1.0, 10.0], [2.0, math.inf, 0.01]),
    ]
    picture = divergence_figure([TrainingCurves("one", curves, 2.0), TrainingCurves("two", curves[2:], None)])
    assert picture.startswith(b"\x89PNG")
    left, right, *_ = drawn[0].axes
    assert (
        left.get_xscale() == left.get_yscale() == right.get_xscale() == "log" and left.get_title(loc="left") == "one"
    )
    lines = {line.get_label(): line for line in left.lines}
    assert set(lines) == {"A", "B", "the prior"}
    assert list(lines["A"].get_xdata()) == [10, 100] and lines["A"].get_ydata() == pytest.approx([1.0, 0.2])
    assert list(lines["B"].get_xdata()) == [100]  # neither the start nor what is infinite
    assert list(right.lines[0].get_xdata()) == [2.0, 20.0]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["A", "B", "the prior"]


@pytest.mark.parametrize("values", [[math.nan], [0.0], [-1.0], [1e-9]])
def test_nothing_that_can_be_measured_breaks_it(values: list[float]) -> None:
    assert divergence_figure([TrainingCurves("one", [Curve("A", [1], [1.0], values)], 0.0)]).startswith(b"\x89PNG")


def test_every_trainer_has_a_look_of_its_own(drawn: list[Figure]) -> None:
    divergence_figure([TrainingCurves("one", [Curve(f"{i}", [1, 2], [1.0, 2.0], [1.0, 0.5]) for i in range(7)])])
    looks = {(line.get_color(), line.get_marker()) for line in drawn[0].axes[0].lines}
    assert len(looks) == len({color for color, _ in looks}) == 7
