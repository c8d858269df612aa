"""Accuracy over a list of pairs that is cut into folds, the way LFW and CFP are reported.

Each fold is classified with the threshold that was best on the *other* folds, so no pair is judged by a threshold it
helped to choose. Scores come from the caller (`cosine.pair_scores`).
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
    """Accuracy of `score >= t` over folds (Huang et al., "Labeled Faces in the Wild", 2007, section on reporting).

    The threshold of a fold is the *smallest observed score* of the other folds with the highest accuracy there;
    rejecting everything (threshold infinity) is tried too. Folds weigh the same, whatever their size.

    Args:
        scores: `[pairs]`, higher = more alike.
        same: bool `[pairs]`, whether a pair is genuine.
        folds: integer `[pairs]`.

    Raises ValueError for lengths that differ, scores that are not finite, and where `why_not` says why not.
    """
    if not scores.shape == same.shape == folds.shape or scores.ndim != 1:
        raise ValueError(
            f"scores, same and folds have shapes {scores.shape}, {same.shape}, {folds.shape}; pass one length"
        )
    if not np.isfinite(scores).all():
        raise ValueError("pair scores hold NaN or infinity; leave such pairs out, and count them")
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

    A threshold that was chosen on one kind of pair accepts, or rejects, all; what it gives elsewhere is no accuracy.
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
    """Return the smallest observed score whose `score >= t` is right most often; infinity if rejecting all is."""
    candidates, first = np.unique(np.sort(scores), return_index=True)
    order = np.argsort(scores, kind="stable")
    genuine_below = np.concatenate([[0], np.cumsum(same[order])])
    first = np.append(first, len(scores))
    # Right: impostors below the threshold and genuine pairs from it on.
    right = (first - genuine_below[first]) + (genuine_below[-1] - genuine_below[first])
    return float(np.append(candidates, np.inf)[int(np.argmax(right))])
