import pytest

from reports.text import (
    cell_name,
    counted,
    in_words,
    interval,
    metric_name,
    percent,
    percent_of,
    points,
    points_interval,
    pose_pair,
    verdict,
    visible,
)
from schemas.metrics import EER, MetricId
from schemas.reports import Estimate


@pytest.mark.parametrize(
    ("share", "printed"),
    [
        (0.0, "0"),
        (0.12571, "12.57"),
        (1.0, "100.00"),
        (0.001, "0.10"),
        (0.00034567, "0.035"),
        (1e-6, "0.0001"),
        (-3.5e-16, "0"),
    ],
)
def test_percent_keeps_two_significant_digits_of_small_shares(share: float, printed: str) -> None:
    assert percent(share) == printed


@pytest.mark.parametrize(
    ("difference", "printed"),
    [(0.0, "0"), (-0.0236, "−2.36"), (0.0085, "+0.85"), (-0.000004, "−0.0004"), (-3.5e-16, "0")],
)
def test_points_carry_their_sign_and_never_round_a_difference_to_nothing(difference: float, printed: str) -> None:
    assert points(difference) == printed


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.02, -0.01, "better"),
        (0.01, 0.02, "worse"),
        (-0.01, 0.01, "no difference"),
        (-0.01, 0.0, "no difference"),
        (0.0, 0.01, "no difference"),
        (None, None, "no interval"),
    ],
)
def test_only_an_interval_clear_of_zero_is_a_difference(low: float | None, high: float | None, expected: str) -> None:
    assert verdict(Estimate(value=0.0, low=low, high=high)) == expected


def test_intervals_are_printed_or_absent() -> None:
    assert interval(Estimate(value=0.1, low=0.09, high=0.11)) == "9.00 to 11.00"
    assert interval(Estimate(value=0.1)) is None
    assert points_interval(Estimate(value=0.0, low=-0.01, high=0.02)) == "−1.00 to +2.00"
    assert points_interval(Estimate(value=0.0)) is None


def test_words_say_when_there_is_no_value() -> None:
    assert in_words(Estimate(value=0.1, low=0.09, high=0.11)) == "10.00% (95% interval 9.00 to 11.00)"
    assert in_words(Estimate(value=0.1)) == "10.00%"
    assert in_words(Estimate(value=None, reason="not estimable: too few")) == "not estimable"


@pytest.mark.parametrize(
    ("cell", "poses", "name"),
    [
        ("all", None, "all pairs"),
        ("frontal-profile", ("frontal", "profile"), "frontal–profile"),
        ("half-left-half-left", ("half-left", "half-left"), "half-left–half-left"),
        ("half-left-profile", None, "half-left-profile"),
    ],
)
def test_cells_are_named_by_their_poses_where_that_is_unambiguous(
    cell: str, poses: tuple[str, str] | None, name: str
) -> None:
    assert pose_pair(cell) == poses
    assert cell_name(cell) == name


def test_metrics_are_named_with_their_rate_in_percent() -> None:
    assert metric_name(EER) == "EER"
    assert metric_name(MetricId("fnmr@1e-3")) == "FNMR at own FMR 0.1%"
    assert metric_name(MetricId("fnmr_global@1e-3")) == "FNMR at global FMR 0.1%"
    assert [percent_of(rate) for rate in ("1e-1", "1e-6", "0.25")] == ["10%", "0.0001%", "25%"]


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("plain-7", "plain-7"),
        ("Grüße 正面", "Grüße 正面"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x00\x1b[31m", "\\u0000\\u001b[31m"),
        ("abc\u202ecba", "abc\\u202ecba"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_visible_writes_out_what_cannot_be_seen(text: str, printed: str) -> None:
    assert visible(text) == printed
    visible(text).encode()


@pytest.mark.parametrize(("number", "printed"), [(0, "0 rows"), (1, "1 row"), (2000, "2,000 rows")])
def test_numbers_agree_with_their_noun(number: int, printed: str) -> None:
    assert counted(number, "row") == printed
