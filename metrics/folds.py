"""Accuracy over a list of pairs in folds, as LFW and CFP report it.

Each fold is classified with the threshold that was best on the *other* folds, so no pair helps to choose the threshold
it is classified with. Scores come from the caller (`cosine.pair_scores`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class FoldAccuracy:
    """Accuracy over folds: `mean`, `sd` (n - 1 in the denominator) of the folds' accuracies, and each fold's own."""

    mean: float
    sd: float
    n_pairs: int
    folds: tuple[int, ...]
    accuracies: tuple[float, ...]
    thresholds: tuple[float, ...]


def fold_accuracy(
    scores: NDArray[np.floating[Any]], same: NDArray[np.bool_], folds: NDArray[np.integer[Any]]
) -> FoldAccuracy:
    """Return the accuracy of `score >= t` over folds (Huang et al., "Labeled Faces in the Wild", 2007, on reporting).

        t(f)        = the smallest observed score of the folds other than f with the highest accuracy there
        accuracy(f) = share of pairs of fold f with (score >= t(f)) = same
        mean, sd    = of accuracy(f) over folds; every fold counts the same

    Rejecting everything (t = infinity) is tried too.

    Args:
        scores: `[pairs]`, higher = more alike.
        same: bool `[pairs]`, whether a pair is genuine.
        folds: integer `[pairs]`.

    Raises ValueError for lengths that differ, scores that are not finite, and where `why_not` gives a reason.

    >>> scores, same = np.array([0.9, 0.2, 0.6, 0.5]), np.array([True, False, True, False])
    >>> found = fold_accuracy(scores, same, np.array([1, 1, 2, 2]))
    >>> found.thresholds, found.accuracies, found.mean
    ((0.6, 0.9), (1.0, 0.5), 0.75)
    """
    if not scores.shape == same.shape == folds.shape or scores.ndim != 1:
        raise ValueError(
            f"scores, same and folds have shapes {scores.shape}, {same.shape}, {folds.shape}; pass one length"
        )
    if not np.isfinite(scores).all():
        raise ValueError("pair scores hold NaN or infinity; leave such pairs out and count them")
    same = same.astype(bool)
    if reason := why_not(same, folds):
        raise ValueError(reason)
    names = np.unique(folds)
    thresholds = [best_threshold(scores[folds != fold], same[folds != fold]) for fold in names]
    accuracies = [
        float(np.mean((scores[folds == fold] >= threshold) == same[folds == fold]))
        for fold, threshold in zip(names, thresholds, strict=True)
    ]
    return FoldAccuracy(
        mean=float(np.mean(accuracies)),
        sd=float(np.std(accuracies, ddof=1)),
        n_pairs=len(scores),
        folds=tuple(int(fold) for fold in names),
        accuracies=tuple(accuracies),
        thresholds=tuple(thresholds),
    )


def why_not(same: NDArray[np.bool_], folds: NDArray[np.integer[Any]]) -> str | None:
    """Return why there is no accuracy over folds: one fold, or one with no genuine or no impostor pair outside of it.

    A threshold chosen on one kind of pair accepts or rejects everything, so it gives no accuracy elsewhere.

    >>> why_not(np.array([True, False]), np.array([0, 0]))
    '1 fold(s); the threshold of a fold comes from others, so two or more are needed'
    """
    names = np.unique(folds)
    if len(names) < 2:
        return f"{len(names)} fold(s); the threshold of a fold comes from others, so two or more are needed"
    for fold in names:
        for wanted, kind in ((True, "genuine"), (False, "impostor")):
            if not (same[folds != fold] == wanted).any():
                return f"there is no {kind} pair outside of fold {fold} to choose its threshold with"
    return None


def best_threshold(scores: NDArray[np.floating[Any]], same: NDArray[np.bool_]) -> float:
    """Return the smallest observed score t for which `score >= t` is right most often; infinity if rejecting all is.

    >>> best_threshold(np.array([0.1, 0.4, 0.6]), np.array([False, True, True]))
    0.4
    """
    candidates, first = np.unique(np.sort(scores), return_index=True)
    order = np.argsort(scores, kind="stable")
    genuine_below = np.concatenate([[0], np.cumsum(same[order])])
    first = np.append(first, len(scores))
    # Right: impostors below the threshold and genuine pairs from it on.
    right = (first - genuine_below[first]) + (genuine_below[-1] - genuine_below[first])
    return float(np.append(candidates, np.inf)[int(np.argmax(right))])
