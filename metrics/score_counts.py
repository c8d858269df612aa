"""All scores of a comparison, in the one form that every verification metric is computed from.

Genuine scores are few and kept one by one. Impostor scores may be billions and are kept as distinct values with counts.
Nothing is approximated: the same integers come out as from sorting every score. Where the scores come from (arrays of a
caller, or `allpairs`) and what is computed from them is left to the neighbouring modules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class ScoreCounts:
    """All scores of a comparison; a pair *matches* at threshold t when its score is >= t.

    `genuine` holds every genuine score, ascending; `impostor` the distinct impostor scores, ascending;
    `impostor_at_least[i]` how many impostor scores are >= `impostor[i]` (int64, so it falls from the total).

    >>> counts = ScoreCounts.from_scores([0.9, 0.5], [0.5, 0.5, 0.1])
    >>> counts.false_matches([0.5, 0.6]), counts.false_non_matches([0.5, 0.6])
    (array([2, 0]), array([0, 1]))
    """

    genuine: NDArray[np.floating[Any]]
    impostor: NDArray[np.floating[Any]]
    impostor_at_least: NDArray[np.int64]

    @classmethod
    def from_scores(cls, genuine: ArrayLike, impostor: ArrayLike) -> "ScoreCounts":
        """Count two 1-D arrays of scores (higher = more alike), in the precision they come in.

        Raises ValueError for an array that is not one-dimensional or holds NaN or infinity.
        """
        genuine_scores, impostor_scores = _scores("genuine", genuine), _scores("impostor", impostor)
        precision = np.result_type(genuine_scores, impostor_scores)
        values, counts = np.unique(impostor_scores.astype(precision), return_counts=True)
        return cls.from_counts(np.sort(genuine_scores.astype(precision)), values, counts)

    @classmethod
    def from_counts(
        cls, genuine: NDArray[np.floating[Any]], impostor: NDArray[np.floating[Any]], counts: NDArray[np.integer[Any]]
    ) -> "ScoreCounts":
        """Build from ascending genuine scores, and ascending distinct impostor scores with their counts."""
        return cls(genuine, impostor, np.cumsum(counts[::-1], dtype=np.int64)[::-1])

    @property
    def n_genuine(self) -> int:
        """The number of genuine pairs."""
        return len(self.genuine)

    @property
    def n_impostor(self) -> int:
        """The number of impostor pairs."""
        return int(self.impostor_at_least[0]) if len(self.impostor_at_least) else 0

    def false_matches(self, thresholds: ArrayLike) -> NDArray[np.int64]:
        """Return how many impostor scores are >= each threshold."""
        first = np.searchsorted(self.impostor, _not_below(thresholds, self.impostor.dtype), side="left")
        counts = np.zeros(first.shape, dtype=np.int64)
        inside = first < len(self.impostor)
        counts[inside] = self.impostor_at_least[first[inside]]
        return counts

    def false_non_matches(self, thresholds: ArrayLike) -> NDArray[np.int64]:
        """Return how many genuine scores are < each threshold."""
        first = np.searchsorted(self.genuine, _not_below(thresholds, self.genuine.dtype), side="left")
        return np.asarray(first, dtype=np.int64)

    def impostor_counts(self) -> NDArray[np.int64]:
        """Return how often each value of `impostor` occurs."""
        return -np.diff(self.impostor_at_least, append=0)

    def next_observed_above(self, score: float) -> float | None:
        """Return the smallest observed score, genuine or impostor, above `score`; None when there is none."""
        return min(_first_beyond(score, (self.impostor, self.genuine)), default=None)

    def last_observed_below(self, score: float) -> float | None:
        """Return the largest observed score, genuine or impostor, below `score`; None when there is none."""
        negated = _first_beyond(-score, (-self.impostor[::-1], -self.genuine[::-1]))
        return -min(negated) if negated else None


def _scores(name: str, values: ArrayLike) -> NDArray[np.floating[Any]]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} scores have shape {array.shape}; pass a one-dimensional array")
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} scores hold NaN or infinity; leave such pairs out and count them")
    return array


def _not_below(thresholds: ArrayLike, precision: np.dtype[Any]) -> NDArray[np.floating[Any]]:
    """Round thresholds up to the precision of the scores: `score >= t` stays true for exactly the same scores.

    Without it NumPy would widen millions of float32 scores to float64 on every look-up.
    """
    wanted = np.asarray(thresholds, dtype=np.float64)
    rounded = wanted.astype(precision)
    return np.where(rounded < wanted, np.nextafter(rounded, np.inf, dtype=precision), rounded)


def _first_beyond(score: float, ascending: Sequence[NDArray[np.floating[Any]]]) -> list[float]:
    positions = [(values, np.searchsorted(values, values.dtype.type(score), side="right")) for values in ascending]
    return [float(values[position]) for values, position in positions if position < len(values)]
