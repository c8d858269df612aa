"""Every metric is compared with a reference that enumerates thresholds one by one, with scikit-learn and with pyeer."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyeer.eer_stats import calculate_roc, get_decidability_value, get_eer_values
from sklearn.metrics import roc_auc_score, roc_curve

from metrics.score_counts import ScoreCounts
from metrics.verification import (
    FMR_POINTS,
    det_curve,
    equal_error_rate,
    fmr_by_score,
    operating_point,
    score_histogram,
    verify,
)

TIED_SCORES = st.lists(st.integers(-4, 4).map(lambda number: number / 4), min_size=1, max_size=40)


def simulated(n_genuine: int = 400, n_impostor: int = 20_000, decimals: int = 9) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(7)
    genuine = random.normal(0.55, 0.17, n_genuine).round(decimals)
    return genuine, random.normal(0.05, 0.1, n_impostor).round(decimals)


def fnmr_by_enumeration(genuine: list[float], impostor: list[float], target: Fraction) -> tuple[float, float] | None:
    """Try every observed score as a threshold: the definition, word for word."""
    if target * len(impostor) < 1:
        return None
    for threshold in sorted({*genuine, *impostor}):
        if Fraction(sum(score >= threshold for score in impostor), len(impostor)) <= target:
            return threshold, sum(score < threshold for score in genuine) / len(genuine)
    return None


def eer_by_enumeration(genuine: list[float], impostor: list[float]) -> Fraction:
    points = [
        (
            Fraction(sum(score >= threshold for score in impostor), len(impostor)),
            Fraction(sum(score < threshold for score in genuine), len(genuine)),
        )
        for threshold in [*sorted({*genuine, *impostor}), math.inf]
    ]
    for before, after in pairwise(points):
        if after[0] == after[1]:
            return after[0]
        if after[0] < after[1]:
            return sum(min(before, after, key=sum), Fraction(0)) / 2
    raise AssertionError("FMR falls from 1 to 0 and FNMR rises from 0 to 1")


@settings(deadline=None)
@given(TIED_SCORES, TIED_SCORES, st.integers(1, 99))
def test_fnmr_at_fmr_is_the_first_observed_threshold_at_most_the_target(
    genuine: list[float], impostor: list[float], percent: int
) -> None:
    point = operating_point(ScoreCounts.from_scores(genuine, impostor), percent / 100)
    expected = fnmr_by_enumeration(genuine, impostor, Fraction(percent, 100))
    if expected is None:
        assert point.threshold is point.fmr is point.fnmr is None
        assert point.reason
    else:
        assert (point.threshold, point.fnmr) == expected
        assert point.fmr == sum(score >= expected[0] for score in impostor) / len(impostor) <= percent / 100
        assert point.reason is None


def test_fnmr_at_fmr_by_hand() -> None:
    # Impostors 0.0 … 0.9: at most two of ten may match, so 0.7 is too low; the next observed score is a genuine one.
    counts = ScoreCounts.from_scores([0.5, 0.79, 0.8, 0.95, 1.0], np.arange(10) / 10)
    point = operating_point(counts, 0.2)
    assert (point.threshold, point.fmr, point.fnmr) == (0.79, 0.2, 0.2)
    # With 0.19 only one may match; the next observed score above 0.8 is the impostor 0.9.
    assert operating_point(counts, 0.19).threshold == 0.9


def test_a_target_is_read_as_the_decimal_it_prints_as() -> None:
    impostor = np.arange(100) / 100
    assert 0.29 * 100 < 29  # in binary
    assert operating_point(ScoreCounts.from_scores([0.5], impostor), 0.29).fmr == 0.29


@pytest.mark.parametrize(
    ("genuine", "impostor", "target", "reason"),
    [
        ([], [0.1], 0.5, "no genuine pair"),
        ([0.1], [], 0.5, "no impostor pair"),
        ([0.9], [0.1] * 99, 1e-2, "FMR 0.01 needs 100 impostor pairs or more; found 99"),
        ([0.4], [0.1, 0.5, 0.5, 0.5], 0.5, "3 impostor scores tie at the largest score; FMR 0.5 allows 2"),
    ],
)
def test_what_cannot_be_estimated_says_why(
    genuine: list[float], impostor: list[float], target: float, reason: str
) -> None:
    point = operating_point(ScoreCounts.from_scores(genuine, impostor), target)
    assert (point.threshold, point.fmr, point.fnmr, point.reason) == (None, None, None, reason)


def test_just_enough_impostors_are_enough() -> None:
    point = operating_point(ScoreCounts.from_scores([0.9], np.arange(100) / 1000), 1e-2)
    assert (point.threshold, point.fmr, point.fnmr) == (0.099, 0.01, 0.0)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, 2.0])
def test_a_target_that_is_no_rate_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        operating_point(ScoreCounts.from_scores([0.1], [0.1]), target)


@settings(max_examples=60)
@given(TIED_SCORES, TIED_SCORES)
def test_fmr_by_score_has_the_operating_point_of_every_rate_that_the_pairs_show(genuine, impostor) -> None:
    counts = ScoreCounts.from_scores(genuine, impostor)
    found = fmr_by_score(counts, (0.3, 1e-6))
    grid = {float(f"{step}e-{decade}") for decade in (1, 2) for step in (8, 6.3, 5, 4, 3.15, 2.5, 2, 1.6, 1.25, 1)} | {
        0.3
    }
    points = {target: operating_point(counts, target) for target in sorted(grid, reverse=True)}
    shown = {target: point for target, point in points.items() if point.threshold is not None}
    assert (found.n_impostor, found.targets) == (len(impostor), list(shown))
    assert found.scores == [point.threshold for point in shown.values()] == sorted(found.scores)
    assert found.fmr == [point.fmr for point in shown.values()]


@pytest.mark.parametrize("decimals", [1, 2, 9])
def test_operating_points_are_on_the_roc_of_scikit_learn(decimals: int) -> None:
    genuine, impostor = simulated(decimals=decimals)
    truth = np.r_[np.ones(len(genuine)), np.zeros(len(impostor))]
    fpr, tpr, _ = roc_curve(truth, np.r_[genuine, impostor], drop_intermediate=False)
    estimable = 0
    for point in verify(genuine, impostor).points:
        if point.fmr is None or point.fnmr is None:
            continue
        estimable += 1
        assert point.fnmr == pytest.approx(1 - tpr[fpr <= point.target_fmr].max(), abs=1e-12)
    assert estimable >= 3


@settings(deadline=None)
@given(TIED_SCORES, TIED_SCORES)
def test_eer_is_the_crossing_found_by_enumeration(genuine: list[float], impostor: list[float]) -> None:
    eer = equal_error_rate(ScoreCounts.from_scores(genuine, impostor))
    assert eer.value == pytest.approx(float(eer_by_enumeration(genuine, impostor)), abs=1e-15)


@settings(deadline=None)
@given(TIED_SCORES, TIED_SCORES)
def test_eer_and_d_prime_agree_with_pyeer(genuine: list[float], impostor: list[float]) -> None:
    # Where FMR > FNMR at every observed score, pyeer warns and returns 1; we close the curve at (FMR 0, FNMR 1).
    # Its d′ is an absolute value. Its thresholds on ties of FMR + FNMR follow rounding, so only the rate is compared.
    assume(np.std(genuine) + np.std(impostor) > 0)
    assume(max(genuine) != max(impostor))
    _, fmr, fnmr = calculate_roc(list(genuine), list(impostor))
    result = verify(genuine, impostor)
    assert result.eer.value == pytest.approx(get_eer_values(fmr, fnmr)[-1], abs=1e-12)
    theirs = get_decidability_value(np.mean(genuine), np.std(genuine), np.mean(impostor), np.std(impostor))
    assert result.d_prime is not None
    assert abs(result.d_prime) == pytest.approx(theirs, abs=1e-9)


def test_eer_agrees_with_the_interpolated_roc_of_scikit_learn() -> None:
    genuine, impostor = simulated()
    fpr, tpr, _ = roc_curve(np.r_[np.ones(len(genuine)), np.zeros(len(impostor))], np.r_[genuine, impostor])
    gap = fpr - (1 - tpr)
    first = int(np.argmax(gap > 0))
    share = gap[first - 1] / (gap[first - 1] - gap[first])
    interpolated = fpr[first - 1] + share * (fpr[first] - fpr[first - 1])
    assert verify(genuine, impostor).eer.value == pytest.approx(interpolated, abs=1 / len(genuine))


@pytest.mark.parametrize(
    ("genuine", "impostor", "rate"),
    [
        ([0.8, 0.9], [0.1, 0.2], 0.0),  # separated: the first score at which nothing is wrong
        ([0.1, 0.2], [0.8, 0.9], 1.0),  # reversed
        ([0.5], [0.5], 0.5),  # one tie: the crossing is above it, where the sum of errors is no smaller
        ([0.4, 0.6], [0.3, 0.5], 0.5),  # FMR = FNMR = 1/2 at 0.5 exactly
        ([], [0.5], None),
        ([0.5], [], None),
    ],
)
def test_eer_by_hand(genuine: list[float], impostor: list[float], rate: float | None) -> None:
    assert equal_error_rate(ScoreCounts.from_scores(genuine, impostor)).value == rate


@settings(deadline=None)
@given(TIED_SCORES, TIED_SCORES)
def test_auc_is_that_of_scikit_learn_with_ties(genuine: list[float], impostor: list[float]) -> None:
    expected = roc_auc_score([1] * len(genuine) + [0] * len(impostor), genuine + impostor)
    assert verify(genuine, impostor).auc == pytest.approx(expected, abs=1e-12)


def test_auc_counts_a_tie_as_half() -> None:
    assert verify([0.5, 0.7], [0.5, 0.1]).auc == (0.5 + 1 + 1 + 1) / 4


def test_d_prime_by_hand_keeps_its_sign() -> None:
    # Means 3 and 1, population variances 1 and 1.
    assert verify([2.0, 4.0], [0.0, 2.0]).d_prime == pytest.approx(2.0)
    assert verify([0.0, 2.0], [2.0, 4.0]).d_prime == pytest.approx(-2.0)
    assert verify([1.0], [0.0]).d_prime is None


def test_every_point_of_a_thinned_det_curve_is_exact() -> None:
    genuine, impostor = simulated(decimals=3)
    curve = det_curve(ScoreCounts.from_scores(genuine, impostor), points=100)
    assert 50 < len(curve.thresholds) <= 100
    for threshold, fmr, fnmr in zip(curve.thresholds, curve.fmr, curve.fnmr, strict=True):
        assert fmr == np.mean(impostor >= threshold)
        assert fnmr == np.mean(genuine < threshold)
        assert threshold in genuine or threshold in impostor
    assert (np.diff(curve.fmr) <= 0).all()
    assert (np.diff(curve.fnmr) >= 0).all()
    assert curve.fmr.min() < 1e-3
    assert curve.fnmr.min() <= 1 / len(genuine)


def test_a_det_curve_without_pairs_is_empty() -> None:
    assert len(det_curve(ScoreCounts.from_scores([], [0.1])).thresholds) == 0


def test_histogram_counts_every_score_once() -> None:
    genuine, impostor = simulated(decimals=2)
    histogram = score_histogram(ScoreCounts.from_scores(genuine, impostor), bins=8, low=0.0, high=1.0)
    inner = [-np.inf, *histogram.edges[1:-1], np.inf]
    for scores, counts in [(genuine, histogram.genuine), (impostor, histogram.impostor)]:
        expected = [np.sum((low <= scores) & (scores < high)) for low, high in pairwise(inner)]
        assert counts.tolist() == expected
        assert counts.sum() == len(scores)


def test_an_asked_point_is_found_and_another_is_refused() -> None:
    result = verify(*simulated())
    assert result.at(1e-2) is result.points[FMR_POINTS.index(1e-2)]
    with pytest.raises(KeyError, match="not computed"):
        result.at(0.5)
