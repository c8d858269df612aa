import numpy as np
import pytest
from matplotlib.colors import to_hex

from reports.axes import bounds, canvas, error_curve, line_style, mark_style, mode_legend, short, slug
from reports.drawing import Plot, drawing
from reports.theme import light
from schemas.reports import Estimate

MODES = ["raw", "per_sample", "batch_stat"]


@drawing()
def test_plots_of_one_size_have_their_axes_in_the_same_place() -> None:
    places = [canvas(title, 300, 200, left=40, bottom=30)[1].get_position().bounds for title in ("a", "much longer")]
    assert places[0] == places[1]
    assert np.allclose(np.array(places[0]) * [300, 200, 300, 200], [40, 30, 250, 142])


def test_modes_can_be_distinguished_without_colour() -> None:
    assert len({str(line_style(mode, MODES)["ls"]) for mode in MODES}) == 3
    assert len({mark_style(mode, MODES)["marker"] for mode in MODES}) == 3


def test_hollow_marks_are_filled_with_paper() -> None:
    assert mark_style("raw", MODES)["mfc"] == light("raw")
    assert mark_style("raw", MODES, solid=False)["mfc"] == light("paper")


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(value=0.5, low=0.4, high=0.6), (0.4, 0.6)),
        (Estimate(value=0.5), (0.5, 0.5)),
        (Estimate(value=0.5, high=0.6), (0.5, 0.6)),
    ],
)
def test_bounds_fall_back_on_the_value(estimate: Estimate, expected: tuple[float, float]) -> None:
    assert bounds(estimate) == expected


@drawing()
def test_error_curve_draws_intervals_line_and_marks_in_percent() -> None:
    _, axes = canvas("t", 300, 200, left=40, bottom=30)
    known = [(0.0, Estimate(value=0.1, low=0.05, high=0.2)), (1.0, Estimate(value=0.3))]
    error_curve(axes, known, "per_sample", MODES)
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert drawn[0] == ([0.0, 0.0], [5.0, 20.0])
    assert drawn[2] == drawn[3] == ([0.0, 1.0], [10.0, 30.0])
    assert {to_hex(line.get_color()) for line in axes.lines[:3]} == {light("per_sample")}


@drawing()
def test_legend_names_only_the_modes_shown() -> None:
    figure, _ = canvas("t", 300, 200, left=40, bottom=30)
    mode_legend(figure, MODES[1:], MODES)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == MODES[1:]


def test_short_keeps_one_line_of_visible_text() -> None:
    assert short("frontal–profile") == "frontal–profile"
    assert short("two\n lines\x07") == "two lines\\u0007"
    assert short("x" * 19) == "x" * 17 + "…"


def test_slugs_are_plain_and_keep_different_names_apart() -> None:
    names = ["per_sample", "frontal-profile", "a b", "a-b", "a/b", "../..", "<script>", "正面", "x" * 60, "\udc80"]
    slugs = [slug(name) for name in names]
    assert slugs[:2] == names[:2]
    assert len(set(slugs)) == len(names)
    assert all(one.isascii() and one.replace("-", "").replace("_", "").isalnum() for one in slugs)


@drawing()
def test_dollar_signs_are_text() -> None:
    figure, _ = canvas("$\\frac{$", 300, 200, left=40, bottom=30)
    assert "$\\frac{$" in Plot("plot", "a plot", figure).svg.decode()
