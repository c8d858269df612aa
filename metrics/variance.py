"""Standard errors of error rates, and of their differences, for pairs that share subjects.

A rate of pairs is close to its truth plus the sum of an *influence* of each pair. With u_st the influence of the pairs
of subjects s and t, and U_s what changes without subject s, the dyadic-robust variance is

    V = (n-1)/n · Σ_s U_s² - Σ_{s<t} u_st²

(Fafchamps, Gubert, "The formation of risk sharing networks", J. Dev. Econ. 83, 2007; Aronow, Samii, Assenova,
"Cluster-robust variance estimation for dyadic data", Political Analysis 23, 2015): any two pairs that share a subject
may depend on each other, and the own noise of a pair, which both of its subjects hold, is counted once. A bootstrap
over subjects counts it twice. U_s is that of the jackknife: a subject with many pairs draws the rate towards its own.
V is not taken below half of its first term, which is what independent pairs give.

With F = FMR, G = FNMR, and r = -dG/dF the slope of the DET curve at the threshold, the influences are

    FNMR at an FMR: dG + r dF          EER: (dG + r dF) / (1 + r)

The threshold is rounded to an edge of the coarse bins (2^-10 in score). r is fitted there: a line of G over ln F, from
half to twice the FMR.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metrics.dyads import Dyads
from schemas.metrics import EER, MetricId
from schemas.reports import FEWEST_FALSE_MATCHES, Estimate

Vector = NDArray[np.float64]
Counts = NDArray[np.int64]
_WINDOW = 2.0  # of FMR, either side, for the slope
_FEWEST_EDGES = 4
_NEAR = 1.5  # an edge is used where its false matches are at most so many times more, or fewer, than at the threshold


@dataclass(frozen=True, eq=False)
class FalseMatches:
    """False matches of every dyad at a threshold, all its impostor pairs, int64 `[P]`; their weight in an influence."""

    weight: float
    fmr: float
    matches: Counts
    pairs: Counts


@dataclass(frozen=True, eq=False)
class Influence:
    """The influence of subjects on a rate, float64 `[C]`, and that of dyads: weight · (matches - FMR · pairs), summed.

    `share` of all dyads are there.
    """

    subjects: Vector
    terms: tuple[FalseMatches, ...]
    share: float

    def minus(self, other: "Influence") -> "Influence":
        """Return the influence on the rate minus another of the same rows."""
        others = tuple(replace(one, weight=-one.weight) for one in other.terms)
        return Influence(self.subjects - other.subjects, self.terms + others, self.share)

    def divided_by(self, number: float) -> "Influence":
        """Return the influence on the rate divided by a number."""
        terms = tuple(replace(one, weight=one.weight / number) for one in self.terms)
        return Influence(self.subjects / number, terms, self.share)

    @property
    def dyads(self) -> Vector:
        """The influence of dyads, float64 `[P]`."""
        found = np.zeros(len(self.terms[0].pairs) if self.terms else 0)
        for one in self.terms:
            found += one.weight * one.matches - (one.weight * one.fmr) * one.pairs
        return found

    def standard_error(self) -> float:
        """Return the square root of the dyadic-robust variance."""
        n, dyads = len(self.subjects), self.dyads
        first = (n - 1) / n * float(self.subjects @ self.subjects)
        return math.sqrt(max(first - float(dyads @ dyads) / self.share, first / 2))

    def degrees_of_freedom(self) -> float:
        """Return those of the t distribution: n - 1, and fewer where a few subjects have most of the influence.

        2n / (κ - 1), κ the kurtosis of the subjects' influences: the variance of a sample variance is
        (κ - 1) σ⁴ / n, that of a χ² with f degrees of freedom 2 σ⁴ / f.
        """
        n = len(self.subjects)
        square = float(self.subjects @ self.subjects)
        if not square:
            return n - 1
        kurtosis = n * float((self.subjects**4).sum()) / square**2
        return min(n - 1, max(1.0, 2 * n / (kurtosis - 1))) if kurtosis > 1 else n - 1

    def interval(self, value: float, level: float) -> Estimate:
        """Return a value with the interval value ± t · standard error."""
        from scipy.special import stdtrit  # loaded for this only

        half = float(stdtrit(self.degrees_of_freedom(), (1 + level) / 2)) * self.standard_error()
        return Estimate(value=value, low=value - half, high=value + half)

    def interval_of_ratio(self, change: float, level: float) -> Estimate:
        """Return ratio - 1 with its interval, from the influence on the logarithm of the ratio."""
        found = self.interval(math.log1p(change), level)
        assert found.low is not None
        assert found.high is not None
        return Estimate(value=change, low=math.expm1(found.low), high=math.expm1(min(found.high, 300.0)))


@dataclass(frozen=True, eq=False)
class Curves:
    """Genuine and impostor pairs of a cell by cluster and coarse score, and FNMR and false matches at every edge."""

    genuine: Counts
    ends: Counts
    fnmr: Vector
    false_matches: Vector

    @classmethod
    def of(cls, genuine: Counts, ends: Counts) -> "Curves":
        """Sum the counts of all clusters, `[C, bins]`."""
        below = np.concatenate([[0], np.cumsum(genuine.sum(axis=0))])
        at_least = np.concatenate([np.cumsum(ends.sum(axis=0)[::-1])[::-1], [0]]) / 2
        return cls(genuine, ends, below / max(below[-1], 1), at_least)

    @property
    def fmr(self) -> Vector:
        """FMR at every edge."""
        return np.asarray(self.false_matches / max(self.false_matches[0], 1))

    def edge(self, false_matches: float) -> int | None:
        """Return the edge whose number of false matches is nearest, None where there are too few, or it is not near."""
        if false_matches < FEWEST_FALSE_MATCHES:
            return None
        after = int(np.count_nonzero(self.false_matches > false_matches))
        near = [edge for edge in (after - 1, after) if 0 <= edge < len(self.false_matches) and self.false_matches[edge]]
        if not near:
            return None
        best = min(near, key=lambda edge: abs(math.log(self.false_matches[edge] / false_matches)))
        return best if abs(math.log(self.false_matches[best] / false_matches)) <= math.log(_NEAR) else None

    def crossing(self) -> int | None:
        """Return the edge where FMR and FNMR are nearest, None where it has too few false matches."""
        return self.edge(float(self.false_matches[int(np.argmin(np.abs(self.fmr - self.fnmr)))]))


def slope(fnmr: Vector, fmr: Vector, edge: int) -> float | None:
    """Return r = -dFNMR/dFMR at an edge, None where the bins are too coarse to show it."""
    near = np.flatnonzero((fmr <= _WINDOW * fmr[edge]) & (fmr >= fmr[edge] / _WINDOW))
    if len(near) < _FEWEST_EDGES:
        return None
    x, y = np.log(fmr[near] / fmr[edge]), fnmr[near]
    x = x - x.mean()
    square = float(x @ x)
    return max(0.0, -float(x @ y) / square) / float(fmr[edge]) if square else None


def influence(metric: MetricId, cell: Curves, impostors: Curves, dyads: Dyads, edge: int) -> Influence | None:
    """Return the influences on the EER, or on FNMR at an FMR.

    Args:
        metric: which of the two.
        cell: whose genuine pairs.
        impostors: whose impostor pairs set the threshold: those of the cell, or all.
        dyads: false matches of the same impostor pairs.
        edge: the threshold.
    """
    r = slope(cell.fnmr, impostors.fmr, edge)
    if r is None:
        return None
    of_genuine = 1 / (1 + r) if metric == EER else 1.0
    of_impostor = r * of_genuine
    below, genuine = cell.genuine[:, :edge].sum(axis=1), cell.genuine.sum(axis=1)
    ends, all_ends = impostors.ends[:, edge:].sum(axis=1), impostors.ends.sum(axis=1)
    n_genuine, n_impostor = genuine.sum(), all_ends.sum() / 2
    fnmr, fmr = below.sum() / n_genuine, ends.sum() / 2 / n_impostor
    # Without subject s, G changes by -(below_s - G genuine_s) / (n_genuine - genuine_s); F likewise.
    subjects = of_genuine * (below - fnmr * genuine) / np.maximum(n_genuine - genuine, 1)
    subjects += of_impostor * (ends - fmr * all_ends) / np.maximum(n_impostor - all_ends, 1)
    matches = FalseMatches(of_impostor / n_impostor, float(fmr), dyads.matches[dyads.row[edge]], dyads.pairs)
    return Influence(subjects, (matches,), dyads.share)


def effective_subjects(genuine: NDArray[np.integer[Any]]) -> float:
    """Return how many subjects with equally many genuine pairs weigh as much as these: (Σg)² / Σg².

    >>> effective_subjects(np.array([10, 10, 0])), round(effective_subjects(np.array([900, 10, 10])), 2)
    (2.0, 1.04)
    """
    weights = genuine.astype(np.float64)
    square = float(weights @ weights)
    return float(weights.sum()) ** 2 / square if square else 0.0
