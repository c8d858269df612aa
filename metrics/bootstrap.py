"""Confidence intervals over subjects, for one mode and for the difference of two.

An error rate of one mode has the interval logit(rate) ± t · sd(logit of its draws). A difference of rates that rest on
enough false matches has the interval of `variance`, for draws count the own noise of every pair twice. Any other
difference, such as that of AUC, has the percentile interval of paired draws.

Pairs are not independent: all pairs of a subject share its face. So subjects are drawn with replacement, and every pair
counts as often as its subjects were drawn (Bolle, Ratha, Pankanti, "Error analysis of pattern recognition systems: the
subsets bootstrap", CVIU 93, 2004). Two modes on the same rows are compared with the *same* draws, which takes the
difficulty of the subjects out of the difference. Counts by subject come from `allpairs`.

The weights. A genuine pair of subject s counts m_s times, m_s being how often s was drawn. An impostor pair (s, t)
counts m_s·m_t times. The mean (m_s + m_t)/2 would halve the spread of FMR, as each subject would then carry only half
of its pairs' error (docs/metrics.md has the simulation). The product needs a table of all pairs of subjects. It is
replaced by

    FMR*(t) = FMR(t) · (Σ m_s H_s(t) / Σ H_s(t))² / (Σ m_s H_s(-∞) / Σ H_s(-∞))²,

H_s(t) = ends of impostor pairs with score >= t in subject s. To first order this is the product (both have the Hájek
projection Σ (m_s - 1) H_s(t); van der Vaart, "Asymptotic Statistics", chapter 12), it *is* the product when the
subjects' effects multiply, and unlike the projection it is never negative. Where hardly a subject has more than one
false match, all of these are too wide, not too narrow (Owen, "The pigeonhole bootstrap", Ann. Appl. Stat. 1, 2007).

Thresholds are estimated again in each draw, on the coarse score grid of width 2^-10, FMR being interpolated in its
logarithm. Where there are more subjects than clusters, clusters are drawn instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from metrics.allpairs import AllPairs, Cell, ClusterCounts
from metrics.intervals import with_interval, with_logit_interval
from metrics.variance import Influence
from schemas.metrics import AUC, EER, MetricId
from schemas.reports import Estimate

Samples = NDArray[np.float64]
Drawn = dict[str, dict[MetricId, Samples]]


def bootstrap(
    result: AllPairs, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, dict[MetricId, Estimate]]:
    """Return every metric of every cell with its interval, by cell name and metric.

    Args:
        result: all pairs of one mode.
        resamples: how many draws of subjects.
        seed: equal seeds give equal intervals.
        level: confidence level.

    There is no interval where more than 5% of the draws lack the metric.

    Raises ValueError for fewer than two subjects, or arguments out of range.

    >>> from metrics.allpairs import all_pairs
    >>> rows, subjects = np.random.default_rng(0).normal(size=(60, 8)), np.arange(60) // 3
    >>> found = bootstrap(all_pairs(rows, subjects), resamples=100)["all"][EER]
    >>> found.low <= found.value <= found.high
    True
    """
    drawn, subjects = _draws(result, resamples, seed, level), len(result.overall.counts.genuine)
    return {
        cell.name: {
            metric: with_logit_interval(exact, drawn[cell.name][metric], level, subjects)
            for metric, exact in cell.estimates().items()
        }
        for cell in result
    }


def _draws(result: AllPairs, resamples: int, seed: int, level: float) -> Drawn:
    """Return every metric of every cell in every draw; a result keeps its draws, for it is in several differences."""
    multiplicities = draw_subjects(result, resamples, seed, level)
    drawn: Drawn = result.draws.get((resamples, seed)) or draw(result, multiplicities)
    result.draws[resamples, seed] = drawn
    return drawn


def paired_bootstrap(
    base: AllPairs, other: AllPairs, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, dict[MetricId, Estimate]]:
    """Return `other` - `base` with intervals, by cell name and metric; negative error rates = improvement.

    Both are results on the same rows: same subjects in the same order, same
    classes, same duplicates.

    Raises ValueError when they are not, and as `bootstrap` does.

    >>> from metrics.allpairs import all_pairs
    >>> rows, subjects = np.random.default_rng(0).normal(size=(60, 8)), np.arange(60) // 3
    >>> same = all_pairs(rows, subjects)
    >>> paired_bootstrap(same, same, resamples=100)["all"][EER].high
    0.0
    """
    return _paired(base, other, lambda before, after: after - before, False, resamples, seed, level)


def relative_bootstrap(
    base: AllPairs, other: AllPairs, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, dict[MetricId, Estimate]]:
    """Return (`other` - `base`) / `base` with intervals: on enough false matches, those of the logarithm of the ratio.

    Not estimable where the metric of `base` is 0 and the other is not; 0 where both are.
    """

    def ratio(before: Samples, after: Samples) -> Samples:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(before == after, 0.0, after / before - 1)

    return _paired(base, other, ratio, True, resamples, seed, level)


def _paired(
    base: AllPairs,
    other: AllPairs,
    change: Callable[[Samples, Samples], Samples],
    relative: bool,
    resamples: int,
    seed: int,
    level: float,
) -> dict[str, dict[MetricId, Estimate]]:
    """Return the change from `base` to `other` of every metric of every cell, on the data itself and in every draw."""
    _check_same_rows(base, other)
    before, after = _draws(base, resamples, seed, level), _draws(other, resamples, seed, level)
    changes: dict[str, dict[MetricId, Estimate]] = {}
    for cell, changed in zip(base, other, strict=True):
        new, found = changed.estimates(), changes.setdefault(cell.name, {})
        for metric, old in cell.estimates().items():
            exact = _change(old, new[metric], change)
            on_change = _influence(cell, changed, metric, relative)
            if exact.value is not None and on_change is not None:
                found[metric] = (on_change.interval_of_ratio if relative else on_change.interval)(exact.value, level)
            else:
                samples = change(before[cell.name][metric], after[cell.name][metric])
                found[metric] = with_interval(exact, samples, level)
    return changes


def _influence(base: Cell, other: Cell, metric: MetricId, relative: bool) -> Influence | None:
    """Return the influence on the difference or, if relative, on the logarithm of the ratio.

    None where a metric rests on too few false matches, or a ratio has no logarithm.
    """
    before, after = base.influences.get(metric), other.influences.get(metric)
    if before is None or after is None or not relative:
        return None if before is None or after is None else after.minus(before)
    old, new = base.estimates()[metric].value, other.estimates()[metric].value
    return after.divided_by(new).minus(before.divided_by(old)) if old and new else None


def draw_subjects(result: AllPairs, resamples: int, seed: int, level: float) -> Samples:
    """Return how often each cluster is drawn, `[resamples, clusters]`.

    Raises ValueError for fewer than two subjects, or arguments out of range.
    """
    n_clusters = len(result.overall.counts.genuine)
    if n_clusters < 2:
        raise ValueError(f"{n_clusters} subject(s); the bootstrap over subjects needs two or more")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples = {resamples}, level = {level}; pass a positive number and a level inside (0, 1)")
    random = np.random.default_rng(seed)
    return random.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=resamples).astype(np.float64)


def draw(result: AllPairs, multiplicities: Samples) -> dict[str, dict[MetricId, Samples]]:
    """Return every metric of every cell in every draw, `[resamples]`, NaN where a draw does not have it."""
    targets = [point.target_fmr for point in result.overall.verification.points]
    span = _span(result.overall.counts)
    total = _Curves.of(result.overall.counts, span, multiplicities)
    at_global = {target: total.position_of_fmr(target) for target in targets}
    drawn = {}
    for cell in result:
        curves = total if cell is result.overall else _Curves.of(cell.counts, span, multiplicities)
        of_cell = {EER: curves.equal_error_rate(), AUC: curves.auc()}
        for target in targets:
            of_cell |= {
                MetricId.at("fnmr", target): curves.fnmr_at(curves.position_of_fmr(target)),
                MetricId.at("fnmr_global", target): curves.fnmr_at(at_global[target]),
                MetricId.at("fmr_global", target): curves.fmr_at(at_global[target]),
            }
        # Between two edges rounding may lead out of [0, 1] by some 1e-16.
        drawn[cell.name] = {metric: np.clip(samples, 0.0, 1.0) for metric, samples in of_cell.items()}
    return drawn


def _span(counts: ClusterCounts) -> slice:
    """Return the coarse bins that hold any score; outside of them the curves are flat."""
    used = np.flatnonzero(counts.genuine.any(axis=0) | counts.impostor_ends.any(axis=0))
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)


@dataclass(frozen=True, eq=False)
class _Curves:
    """FMR and FNMR of each draw at the edges of the coarse bins, ascending, `[resamples, edges]`.

    A *position* on the threshold axis is an edge number with a fraction.
    """

    fmr: Samples
    fnmr: Samples

    @classmethod
    def of(cls, counts: ClusterCounts, span: slice, multiplicities: Samples) -> "_Curves":
        genuine_below = np.cumsum(np.pad(counts.genuine[:, span], ((0, 0), (1, 0))), axis=1)
        ends = np.pad(counts.impostor_ends[:, span], ((0, 0), (0, 1)))
        ends_at_least = np.cumsum(ends[:, ::-1], axis=1)[:, ::-1]
        observed = ends_at_least.sum(axis=0)
        rejected = _product(multiplicities, genuine_below)
        drawn_ends = _product(multiplicities, ends_at_least)
        with np.errstate(divide="ignore", invalid="ignore"):
            accepted = np.where(observed > 0, drawn_ends * drawn_ends / observed, 0.0)
            fmr = accepted / accepted[:, :1]
            fnmr = rejected / rejected[:, -1:]
        # The square at a threshold knows nothing of its neighbours; make FMR fall along the thresholds, as it must.
        return cls(np.asarray(np.maximum.accumulate(fmr[:, ::-1], axis=1)[:, ::-1]), fnmr)

    def position_of_fmr(self, target: float) -> Samples:
        """Where each draw's FMR passes the target: interpolated in log FMR, linearly in the bin where it reaches 0."""
        after = np.clip(np.count_nonzero(self.fmr > target, axis=1), 1, self.fmr.shape[1] - 1)
        high, low = _either_side(self.fmr, after)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(low > 0, np.log(high / target) / np.log(high / low), (high - target) / high)
        return np.asarray(after - 1 + share)

    def fnmr_at(self, positions: Samples) -> Samples:
        left, right, share = _around(self.fnmr, positions)
        return left + share * (right - left)

    def fmr_at(self, positions: Samples) -> Samples:
        left, right, share = _around(self.fmr, positions)
        with np.errstate(divide="ignore", invalid="ignore"):
            between = np.where(right > 0, left * (right / left) ** share, left + share * (right - left))
        return np.asarray(between)

    def equal_error_rate(self) -> Samples:
        """Where the two curves cross, both taken as straight between two edges."""
        gap = self.fmr - self.fnmr
        after = np.clip(np.count_nonzero(gap > 0, axis=1), 1, gap.shape[1] - 1)
        before_gap, after_gap = _either_side(gap, after)
        before, behind = _either_side(self.fmr, after)
        return before + (behind - before) * before_gap / (before_gap - after_gap)

    def auc(self) -> Samples:
        """Area by trapezoids; within a bin genuine and impostor scores are as if evenly mixed."""
        fmr_steps = self.fmr[:, :-1] - self.fmr[:, 1:]
        return np.asarray(1 - (fmr_steps * (self.fnmr[:, :-1] + self.fnmr[:, 1:]) / 2).sum(axis=1))


def _product(multiplicities: Samples, counts: NDArray[np.int64]) -> Samples:
    """Multiply matrices in torch, whose speed does not depend on the BLAS that NumPy was built with."""
    return np.asarray((torch.from_numpy(multiplicities) @ torch.from_numpy(counts.astype(np.float64))).numpy())


def _either_side(curve: Samples, after: NDArray[np.int64]) -> tuple[Samples, Samples]:
    draws = np.arange(len(curve))
    return curve[draws, after - 1], curve[draws, after]


def _around(curve: Samples, positions: Samples) -> tuple[Samples, Samples, Samples]:
    known = np.nan_to_num(positions)
    before = np.clip(known.astype(np.int64), 0, curve.shape[1] - 2)
    left, right = _either_side(curve, before + 1)
    return left, right, positions - before


def _change(before: Estimate, after: Estimate, change: Callable[[Samples, Samples], Samples]) -> Estimate:
    if before.value is None or after.value is None:
        return Estimate(value=None, reason="not estimable")
    value = float(change(np.array(before.value), np.array(after.value)))
    return (
        Estimate(value=value) if np.isfinite(value) else Estimate(value=None, reason="not estimable: no error before")
    )


def _check_same_rows(base: AllPairs, other: AllPairs) -> None:
    def outline(result: AllPairs) -> list[tuple[str, int, int, tuple[float, ...]]]:
        return [
            (
                cell.name,
                cell.verification.n_genuine,
                cell.verification.n_impostor,
                tuple(point.target_fmr for point in cell.verification.points),
            )
            for cell in result
        ]

    if not np.array_equal(base.clusters, other.clusters) or outline(base) != outline(other):
        raise ValueError(
            "the two results are not of the same rows; compare both modes over the same rows in the same order"
        )
