"""Verification (1:1) metrics from genuine and impostor scores, after ISO/IEC 19795-1:2021.

A pair matches when `score >= t`:

    FMR(t)  = share of impostor scores >= t
    FNMR(t) = share of genuine scores < t

Tied scores match together or not at all. Every threshold that is reported is a score that was *observed*, genuine or
impostor. A metric that the scores cannot support is None with a reason. Scores come from `allpairs` and `cosine`,
intervals from `bootstrap`.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metrics.score_counts import ScoreCounts
from schemas.reports import Estimate, ScoreFmr

FMR_POINTS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_R10 = ("8", "6.3", "5", "4", "3.15", "2.5", "2", "1.6", "1.25", "1")


@dataclass(frozen=True)
class OperatingPoint:
    """FNMR at an FMR of *at most* `target_fmr`; all None, with a `reason`, when not estimable."""

    target_fmr: float
    threshold: float | None
    fmr: float | None  # reached at the threshold: the target or, where no score lies in between, less
    fnmr: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Verification:
    """The metrics of one comparison. `auc` and `d_prime` are None when a class of pairs is empty (or has no spread)."""

    n_genuine: int
    n_impostor: int
    eer: Estimate
    auc: float | None
    d_prime: float | None
    points: tuple[OperatingPoint, ...]

    def at(self, target_fmr: float) -> OperatingPoint:
        """Return the operating point of one target FMR; KeyError when it was not asked for."""
        for point in self.points:
            if point.target_fmr == target_fmr:
                return point
        raise KeyError(f"FMR {target_fmr:g} was not computed; there are {[point.target_fmr for point in self.points]}")


@dataclass(frozen=True, eq=False)
class DetCurve:
    """Exact points of the detection error trade-off, thresholds ascending: `fmr` falls, `fnmr` rises."""

    thresholds: NDArray[np.float64]
    fmr: NDArray[np.float64]
    fnmr: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ScoreHistogram:
    """Counts of scores in [edge i, edge i + 1), for plots. Scores beyond the ends are counted in the end bins."""

    edges: NDArray[np.float64]
    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]


def verify(genuine: ArrayLike, impostor: ArrayLike, fmr_points: Sequence[float] = FMR_POINTS) -> Verification:
    """Compute all verification metrics of two score arrays.

    Args:
        genuine: float `[n]`, higher = more alike.
        impostor: float `[m]`.
        fmr_points: target false match rates, each inside (0, 1).

    Raises ValueError for NaN, infinity, arrays that are not one-dimensional, and targets outside (0, 1).

    >>> verify([0.9, 0.8, 0.3], [0.5, 0.2, 0.1, 0.0], fmr_points=[0.25]).at(0.25)
    OperatingPoint(target_fmr=0.25, threshold=0.3, fmr=0.25, fnmr=0.0, reason=None)
    """
    return summarise(ScoreCounts.from_scores(genuine, impostor), fmr_points)


def summarise(counts: ScoreCounts, fmr_points: Sequence[float] = FMR_POINTS) -> Verification:
    """Compute all verification metrics of counted scores."""
    return Verification(
        n_genuine=counts.n_genuine,
        n_impostor=counts.n_impostor,
        eer=equal_error_rate(counts),
        auc=auc(counts),
        d_prime=d_prime(counts),
        points=tuple(operating_point(counts, target) for target in fmr_points),
    )


def operating_point(counts: ScoreCounts, target_fmr: float) -> OperatingPoint:
    """Return FNMR at the smallest observed score t with FMR(t) **at most** `target_fmr` (ISO/IEC 19795-1:2021).

        t = min { s observed : FMR(s) <= target },  result FNMR(t)

    Tied scores match together or not at all, so the FMR reached may be below the target. It is returned. The target is
    read as the decimal number that it prints as, so 0.29 of 100 impostors are 29 and not 28.

    Not estimable, with the reason, where

    - there is no genuine or no impostor pair;
    - there are fewer than 1/target impostor pairs: not even one false match is allowed, so the data cannot show the
      rate;
    - no score was observed above a tie that is too large.

    Raises ValueError for a target outside (0, 1).

    >>> counts = ScoreCounts.from_scores([0.9, 0.8, 0.3], [0.5, 0.5, 0.2, 0.1])
    >>> point = operating_point(counts, 0.25)  # 0.5 is tied and would give FMR 0.5
    >>> point.threshold, point.fmr, point.fnmr
    (0.8, 0.0, 0.3333333333333333)
    >>> operating_point(counts, 0.1).reason
    'FMR 0.1 needs 10 impostor pairs or more; found 4'
    """
    if not 0 < target_fmr < 1:
        raise ValueError(f"target FMR {target_fmr} is outside (0, 1)")
    allowed = math.floor(_as_printed(target_fmr) * counts.n_impostor)
    if reason := _missing_pairs(counts):
        return OperatingPoint(target_fmr, None, None, None, reason)
    if allowed == 0:
        needed = fewest_for(target_fmr)
        reason = f"FMR {target_fmr:g} needs {needed} impostor pairs or more; found {counts.n_impostor}"
        return OperatingPoint(target_fmr, None, None, None, reason)
    threshold = _strictest_above(counts, allowed)
    if threshold is None:
        ties = int(counts.impostor_at_least[counts.impostor_at_least > allowed][-1])
        reason = f"{ties} impostor scores tie at the largest score; FMR {target_fmr:g} allows {allowed}"
        return OperatingPoint(target_fmr, None, None, None, reason)
    fmr, fnmr = rates_at(counts, threshold)
    return OperatingPoint(target_fmr, threshold, fmr, fnmr)


def fmr_by_score(counts: ScoreCounts, targets: Sequence[float] = ()) -> ScoreFmr:
    """Return the operating thresholds at FMRs of ten a decade, and at `targets`, as far as they are estimable.

    The FMRs are 0.8, 0.63, 0.5, 0.4, 0.315, 0.25, 0.2, 0.16, 0.125, 0.1 (the R10 series of ISO 3) and their tenths. The
    rule is that of `operating_point`, except that no genuine pair is needed.

    >>> found = fmr_by_score(ScoreCounts.from_scores([0.9], [0.5, 0.4, 0.3, 0.2]))
    >>> found.targets, found.scores
    ([0.8, 0.63, 0.5, 0.4, 0.315, 0.25], [0.3, 0.4, 0.4, 0.5, 0.5, 0.5])
    """
    n_impostor = counts.n_impostor
    decades = range(len(str(n_impostor)) + 1) if n_impostor else ()
    grid = {float(f"{step}e-{decade}") for decade in decades for step in _R10}
    found: list[tuple[float, float, float]] = []
    for target in sorted(grid.union(targets), reverse=True):
        allowed = math.floor(_as_printed(target) * n_impostor)
        threshold = _strictest_above(counts, allowed) if 0 < target < 1 and allowed else None
        if threshold is not None:
            found.append((target, threshold, int(counts.false_matches(threshold)) / n_impostor))
    columns = [list(column) for column in zip(*found, strict=True)] or [[], [], []]
    return ScoreFmr(n_impostor=n_impostor, targets=columns[0], scores=columns[1], fmr=columns[2])


def _strictest_above(counts: ScoreCounts, allowed: int) -> float | None:
    """Return the smallest observed score that at most `allowed` impostor scores reach, None where there is none."""
    # The largest impostor score at which too many would match; every observed score above it is strict enough.
    too_lax = len(counts.impostor) - int(np.searchsorted(counts.impostor_at_least[::-1], allowed, side="right")) - 1
    return counts.next_observed_above(float(counts.impostor[too_lax]))


def fewest_for(rate: float) -> int:
    """Return the fewest trials of which a single one makes up no more than `rate`: ⌈1 / rate⌉.

    >>> fewest_for(0.03)
    34
    """
    return math.ceil(1 / _as_printed(rate))


def _as_printed(rate: float) -> Fraction:
    return Fraction(repr(float(rate)))


def rates_at(counts: ScoreCounts, threshold: float) -> tuple[float | None, float | None]:
    """Return FMR (scores >= t) and FNMR (scores < t) at any threshold t; None for a rate that has no pairs.

    >>> rates_at(ScoreCounts.from_scores([0.5, 0.9], [0.5, 0.1]), 0.5)
    (0.5, 0.0)
    """
    false_matches, false_non_matches = _errors_at(counts, threshold)
    fmr = false_matches / counts.n_impostor if counts.n_impostor else None
    fnmr = false_non_matches / counts.n_genuine if counts.n_genuine else None
    return fmr, fnmr


def equal_error_rate(counts: ScoreCounts) -> Estimate:
    """Return the EER as FVC2000 defines it (Maio et al., "FVC2000", IEEE TPAMI 24(3), 2002), exact from counts.

        t2  = min { s observed : FMR(s) <= FNMR(s) }
        t1  = the observed score just below t2; t1 = t2 where both rates are equal at t2
        t   = t1 where FMR(t1) + FNMR(t1) <= FMR(t2) + FNMR(t2), else t2
        EER = (FMR(t) + FNMR(t)) / 2

    The point that rejects everything (FMR 0, FNMR 1), above all scores, ends the curve.

    >>> equal_error_rate(ScoreCounts.from_scores([0.9, 0.8, 0.4, 0.7], [0.5, 0.2, 0.1, 0.3])).value
    0.25
    """
    if reason := _missing_pairs(counts):
        return Estimate(value=None, reason=reason)
    n_genuine, n_impostor = counts.n_genuine, counts.n_impostor

    def weighted(errors: tuple[int, int]) -> tuple[int, int]:
        """Return FMR and FNMR times both totals: integers, which compare exactly."""
        return errors[0] * n_genuine, errors[1] * n_impostor

    def crossed(threshold: float) -> bool:
        fmr, fnmr = weighted(_errors_at(counts, threshold))
        return fmr <= fnmr

    above = [_first(values, crossed) for values in (counts.impostor, counts.genuine)]
    upper = min((score for score in above if score is not None), default=math.inf)
    errors = _errors_at(counts, upper)
    fmr, fnmr = weighted(errors)
    if fmr != fnmr:
        lower = counts.last_observed_below(upper)
        assert lower is not None  # at the smallest observed score FMR is 1 and FNMR 0: the crossing is above it
        errors = min(_errors_at(counts, lower), errors, key=lambda found: sum(weighted(found)))
    return Estimate(value=(errors[0] / n_impostor + errors[1] / n_genuine) / 2)


def auc(counts: ScoreCounts) -> float | None:
    """Return the area under the ROC curve: P(genuine > impostor) + ½ P(genuine = impostor).

    It is the Mann-Whitney statistic, with exact ties. None when a class of pairs is empty.

    >>> auc(ScoreCounts.from_scores([0.5, 0.9], [0.5, 0.1]))
    0.875
    """
    if _missing_pairs(counts):
        return None
    at_least = np.append(counts.impostor_at_least, 0)
    not_below = at_least[np.searchsorted(counts.impostor, counts.genuine, side="left")]
    above = at_least[np.searchsorted(counts.impostor, counts.genuine, side="right")]
    lost_halves = int(not_below.sum()) + int(above.sum())
    return float(1 - Fraction(lost_halves, 2 * counts.n_genuine * counts.n_impostor))


def d_prime(counts: ScoreCounts) -> float | None:
    """Return d′ = (μ_genuine − μ_impostor) / √((σ²_genuine + σ²_impostor) / 2), population variances (Daugman 2000).

    Negative when genuine scores are the lower ones. None when a class is empty or all scores of each class are equal.

    >>> d_prime(ScoreCounts.from_scores([3.0, 5.0], [0.0, 2.0]))
    3.0
    """
    if _missing_pairs(counts):
        return None
    genuine = counts.genuine.astype(np.float64)
    impostor = counts.impostor.astype(np.float64)
    weights = counts.impostor_counts() / counts.n_impostor
    mean_impostor = float(weights @ impostor)
    variance = float(genuine.var() + weights @ (impostor - mean_impostor) ** 2)
    return (float(genuine.mean()) - mean_impostor) / math.sqrt(variance / 2) if variance > 0 else None


def det_curve(counts: ScoreCounts, points: int = 512) -> DetCurve:
    """Return at most `points` exact points of the DET curve, spread evenly in log FMR and in log FNMR.

    Thinning drops points and never moves one. Empty when a class of pairs is empty.

    >>> det_curve(ScoreCounts.from_scores([0.5, 0.9], [0.6, 0.1])).fmr
    array([1. , 0.5, 0.5, 0. ])
    """
    if _missing_pairs(counts):
        return DetCurve(np.empty(0), np.empty(0), np.empty(0))
    false_matches = np.geomspace(1, counts.n_impostor, points // 2)
    by_fmr = np.searchsorted(-counts.impostor_at_least, -np.round(false_matches).astype(np.int64))
    by_fnmr = np.round(np.geomspace(1, counts.n_genuine, points - points // 2)).astype(np.int64) - 1
    chosen = np.concatenate([counts.impostor[np.minimum(by_fmr, len(counts.impostor) - 1)], counts.genuine[by_fnmr]])
    thresholds = np.unique(chosen.astype(np.float64))
    fmr = counts.false_matches(thresholds) / counts.n_impostor
    return DetCurve(thresholds, fmr, counts.false_non_matches(thresholds) / counts.n_genuine)


def score_histogram(counts: ScoreCounts, bins: int = 200, low: float = -1.0, high: float = 1.0) -> ScoreHistogram:
    """Count both kinds of scores over `bins` equal bins of [low, high]; int64 `[bins]` each.

    >>> score_histogram(ScoreCounts.from_scores([0.5, 0.9], [0.6, -0.9]), bins=4).genuine
    array([0, 0, 0, 2])
    """
    edges = np.linspace(low, high, bins + 1)
    inner = edges[1:-1]
    genuine = np.diff(counts.false_non_matches(inner), prepend=0, append=counts.n_genuine)
    impostor = -np.diff(counts.false_matches(inner), prepend=counts.n_impostor, append=0)
    return ScoreHistogram(edges, genuine.astype(np.int64), impostor.astype(np.int64))


def _missing_pairs(counts: ScoreCounts) -> str | None:
    if not counts.n_genuine:
        return "no genuine pair"
    return None if counts.n_impostor else "no impostor pair"


def _errors_at(counts: ScoreCounts, threshold: float) -> tuple[int, int]:
    """Python integers, so that cross products of counts cannot overflow."""
    return int(counts.false_matches(threshold)), int(counts.false_non_matches(threshold))


def _first(ascending: NDArray[np.floating[Any]], holds: Callable[[float], bool]) -> float | None:
    """Return the smallest value for which a monotone condition holds."""
    position = bisect_left(range(len(ascending)), True, key=lambda index: holds(float(ascending[index])))
    return float(ascending[position]) if position < len(ascending) else None
