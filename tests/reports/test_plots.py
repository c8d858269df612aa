from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle, StepPatch
from scipy.stats import norm

from reports import plots
from reports.drawing import Plot
from reports.text import in_words
from reports.theme import light
from schemas.metrics import EER, RAW, MetricId
from schemas.reports import CellResult, Curve, Estimate, Histogram, IdentificationResult, ModeResult, ReportInput

CELLS = ["all", "frontal-frontal", "frontal-profile", "profile-profile"]
POINT = "1e-3"
NOT = Estimate(value=None, reason="not estimable: too few")


@pytest.fixture
def modes(report_input: ReportInput) -> dict[str, ModeResult]:
    return report_input.evaluation.populations["held_out"].modes


def only_axes(plot: Plot) -> Axes:
    return plot.figure.axes[0]


def cell(**fields: object) -> CellResult:
    plain: dict[str, object] = {
        "n_genuine": 3, "n_impostor": 5, "eer": NOT, "auc": NOT, "d_prime": None, "fnmr": {POINT: NOT},
        "fnmr_global": {POINT: NOT}, "fmr_global": {POINT: None},
    }  # fmt: skip
    return CellResult.model_validate(plain | fields)


def mode(cells: dict[str, CellResult], name: str = RAW, **fields: object) -> ModeResult:
    return ModeResult.model_validate(
        {"mode": name, "model_digest": None, "thresholds": {POINT: None}, "cells": cells, **fields}
    )


def test_differences_stand_at_their_values_filled_only_where_clear_of_zero(modes: dict[str, ModeResult]) -> None:
    drawn = plots.differences(modes, CELLS, [EER, MetricId("fnmr@1e-3")])
    assert [plot.name for plot in drawn] == ["difference-eer", "difference-fnmr-1e-3"]
    marks = [line for line in only_axes(drawn[0]).lines if line.get_marker() in ("s", "^")]
    expected = [modes[name].difference[one]["eer"] for name in ("per_sample", "batch_stat") for one in CELLS]
    assert [line.get_xdata()[0] for line in marks] == pytest.approx([100 * one.value for one in expected])
    for line, one in zip(marks, expected, strict=True):
        hollow = one.low <= 0 <= one.high
        assert (to_hex(line.get_markerfacecolor()) == light("paper")) is hollow
    assert only_axes(drawn[0]).get_xlim() == only_axes(drawn[1]).get_xlim()


def test_det_curves_are_the_normal_deviates_of_both_rates(modes: dict[str, ModeResult]) -> None:
    drawn = plots.det_curves(modes, CELLS)
    assert [plot.name for plot in drawn] == [f"det-{one}" for one in CELLS]
    axes = only_axes(drawn[2])
    cell = modes[RAW].cells["frontal-profile"]
    least = 30 / cell.n_impostor  # the curve ends where fewer than 30 impostor pairs match
    assert any(0 < x < least for x in cell.det.fmr)
    within = [(x, y) for x, y in zip(cell.det.fmr, cell.det.fnmr, strict=True) if least <= x <= 0.5 and y > 0]
    line = axes.lines[0]
    np.testing.assert_allclose(line.get_xdata(), norm.ppf([x for x, _ in within]), atol=1e-9)
    np.testing.assert_allclose(line.get_ydata(), norm.ppf([y for _, y in within]), atol=1e-9)
    ticks = {label.get_text(): at for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}
    assert ticks["1"] == pytest.approx(norm.ppf(0.01))
    assert len({only_axes(plot).get_ylim() for plot in drawn}) == 1


def test_det_marks_stand_at_the_measured_fnmr(modes: dict[str, ModeResult]) -> None:
    axes = only_axes(plots.det_curves(modes, ["frontal-profile"])[0])
    marks = [line for line in axes.lines if line.get_marker() == "s"]
    cell = modes["per_sample"].cells["frontal-profile"]
    assert 0.001 * cell.n_impostor < 30 < 0.01 * cell.n_impostor
    assert [line.get_ydata()[0] for line in marks] == pytest.approx([norm.ppf(cell.fnmr["1e-2"].value)])
    assert [line.get_xdata()[0] for line in marks] == pytest.approx([norm.ppf(0.01)])


def test_scores_show_both_histograms_and_the_global_threshold(modes: dict[str, ModeResult]) -> None:
    plot = plots.score_histograms(modes, ["frontal-profile"], POINT)[0]
    rows = plot.figure.axes[1:]
    assert len(rows) == len(modes)
    for axes, one in zip(rows, modes.values(), strict=True):
        stairs = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
        histogram = one.cells["frontal-profile"].histogram
        assert list(stairs[0].get_data().values) == histogram.genuine
        assert list(stairs[1].get_data().values) == histogram.impostor
        assert axes.lines[0].get_xdata()[0] == one.thresholds[POINT]
    assert len({axes.get_xlim() for axes in rows}) == 1


def test_heat_map_prints_every_pose_pair_once_with_its_number_of_pairs(modes: dict[str, ModeResult]) -> None:
    drawn = plots.pose_heat_maps(modes, POINT)
    assert [plot.name for plot in drawn] == [f"poses-{name}" for name in modes]
    axes = only_axes(drawn[1])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["frontal", "half", "profile"]
    printed = {tuple(round(at) for at in text.get_position()): text.get_text() for text in axes.texts[::2]}
    value = modes["per_sample"].cells["frontal-profile"].fnmr_global[POINT].value
    assert printed[(0, 2)] == f"{100 * value:.2f}%"
    assert len(printed) == 6
    assert {text.get_text() for text in axes.texts[1::2]} == {"n 1,500"}


@pytest.mark.parametrize(
    ("value", "step"), [(0.0, 0), (0.00499, 0), (0.005, 1), (0.03, 3), (0.05, 4), (0.39, 6), (0.4, 7), (1.0, 7)]
)
def test_heat_map_colours_mean_the_same_in_every_report(value: float, step: int) -> None:
    one = mode({"frontal-profile": cell(fnmr_global={POINT: Estimate(value=value)})})
    patch = next(patch for patch in only_axes(plots.pose_heat_maps({RAW: one}, POINT)[0]).patches)
    assert isinstance(patch, Rectangle)
    assert to_hex(patch.get_facecolor()) == light(f"ramp-{step}")


def test_heat_map_says_what_is_not_estimable() -> None:
    axes = only_axes(plots.pose_heat_maps({RAW: mode({"frontal-profile": cell()})}, POINT)[0])
    assert [text.get_text() for text in axes.texts] == ["n/e", "n 3"]


def test_identification_shows_ranks_in_order_and_rates_that_are_not_estimable(modes: dict[str, ModeResult]) -> None:
    cmc, fnir = plots.identification_curves(modes)
    axes = only_axes(cmc)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "10"]
    curves = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 3 and line.get_marker() == "None"]
    np.testing.assert_allclose(curves, [[81, 88, 91], [83, 90, 93], [85, 92, 95]])
    assert [text.get_text() for text in only_axes(fnir).texts] == ["n/e"]
    assert "per_sample at 10 93.00%" in cmc.alt


def test_channel_weights_fall_and_name_the_top(report_input: ReportInput) -> None:
    drawn = plots.channel_weights(report_input.weights)
    assert len({plot.name for plot in drawn}) == len(report_input.weights)
    for plot, one in zip(drawn, report_input.weights, strict=True):
        axes = only_axes(plot)
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), np.sort(one.mean)[::-1])
        note, *more = axes.texts[0].get_text().splitlines()
        assert note == "top: " + ", ".join(str(channel) for channel, _ in one.top[:5])
        assert more == ([] if one.agreement is None else ["rank correlation of members: 0.07"])
        assert f"{one.top[0][0]} ({one.top[0][1]:.3f})" in plot.alt


def test_trend_hollows_what_was_not_promoted_and_shares_its_axis(report_input: ReportInput) -> None:
    drawn = plots.trend_lines(report_input.trend)
    assert [plot.name for plot in drawn] == ["trend-raw", "trend-per_sample", "trend-batch_stat"]
    marks = [line for line in only_axes(drawn[1]).lines if line.get_marker() == "s"]
    filled = [to_hex(line.get_markerfacecolor()) != light("paper") for line in marks]
    assert filled == [point.promoted for point in report_input.trend]
    values = [100 * point.values["per_sample"].value for point in report_input.trend]
    assert [line.get_ydata()[0] for line in marks] == pytest.approx(values)
    assert len({only_axes(plot).get_ylim() for plot in drawn}) == 1


def test_trend_keeps_the_last_thirty_releases(report_input: ReportInput) -> None:
    marks = [line for line in only_axes(plots.trend_lines(report_input.trend * 5)[0]).lines if line.get_marker() == "o"]
    assert len(marks) == 30


@pytest.mark.parametrize(
    "draw",
    [
        lambda modes: plots.differences(modes, CELLS, [EER]),
        lambda modes: plots.det_curves(modes, CELLS),
        lambda modes: plots.score_histograms(modes, CELLS, POINT),
        lambda modes: plots.pose_heat_maps(modes, POINT),
        lambda modes: plots.identification_curves(modes),
    ],
)
@pytest.mark.parametrize("modes", [{}, {RAW: mode({})}, {RAW: mode({"all": cell()})}], ids=["none", "no cell", "bare"])
def test_nothing_measured_draws_nothing(
    draw: Callable[[dict[str, ModeResult]], list[Plot]], modes: dict[str, ModeResult]
) -> None:
    assert draw(modes) == []


def test_nothing_recorded_draws_nothing() -> None:
    assert plots.channel_weights([]) == []
    assert plots.trend_lines([]) == []


def test_single_points_without_intervals_can_be_drawn(report_input: ReportInput) -> None:
    """The first release of a small store: one score a side, one release, no bootstrap."""
    bare = cell(
        eer=Estimate(value=0.0),
        fnmr={POINT: Estimate(value=0.0)},
        fnmr_global={POINT: Estimate(value=0.0)},
        det=Curve(fmr=[1.0, 0.0], fnmr=[0.0, 1.0]),
        histogram=Histogram(edges=[0.0, 1.0], genuine=[1.0], impostor=[0.0]),
    )
    found = IdentificationResult(
        gallery="all", probes="all", n_gallery=1, n_gallery_subjects=1, n_mated=1, n_non_mated=0,
        rank={"1": Estimate(value=1.0)}, fnir={"1e-2": NOT},
    )  # fmt: skip
    modes = {
        RAW: mode({"all": bare, "frontal-profile": bare}, identification=found.model_dump()),
        "per_sample": mode({"all": bare}, "per_sample", difference={"all": {"eer": {"value": 0.0}}}),
    }
    point = report_input.trend[-1].model_copy(update={"values": {RAW: Estimate(value=0.0), "per_sample": NOT}})
    drawn = [
        *plots.differences(modes, ["all"], [EER]),
        *plots.det_curves(modes, ["all"]),
        *plots.score_histograms(modes, ["all"], POINT),
        *plots.pose_heat_maps(modes, POINT),
        *plots.identification_curves(modes),
        *plots.trend_lines([point]),
    ]
    assert [plot.name for plot in drawn] == [
        "difference-eer", "det-all", "scores-all", "poses-raw", "cmc", "fnir", "trend-raw", "trend-per_sample",
    ]  # fmt: skip
    assert all(b"</svg>" in plot.svg for plot in drawn)
    assert "latest not estimable" in drawn[-1].alt


def test_alternative_texts_hold_the_key_value(modes: dict[str, ModeResult]) -> None:
    eer = modes["per_sample"].cells["frontal-profile"].eer.value
    assert f"per_sample EER {100 * eer:.2f}% (95% interval" in plots.det_curves(modes, ["frontal-profile"])[0].alt
    miss = in_words(modes[RAW].cells["all"].fnmr_global[POINT])
    assert f"raw {miss} of genuine pairs below" in plots.score_histograms(modes, ["all"], POINT)[0].alt
