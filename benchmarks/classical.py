"""Classical transforms of embeddings that need no gradient: the baselines a trained network has to beat.

Each takes a fold and returns a function from raw rows to features. They see the same training rows as the networks, at
unit length. Strengths of shrinkage are those that were best on validation folds of either network.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from metrics.poses import PROFILE
from tasks.training.rows import TrainingRows

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Fold:
    train: TrainingRows
    validation: TrainingRows
    test: TrainingRows
    lfw_test: TrainingRows


def wccn(fold: Fold, shrink: float = 3.0) -> Transform:
    """Within-class covariance normalisation (Hatch et al. 2006) of a scatter that weighs both views alike."""
    _, centre, within, _ = _scatters(fold)
    dim = len(within)
    whiten = _power(within / np.trace(within) * dim + shrink * np.eye(dim), -0.5)
    return lambda rows: (_unit(rows) - centre) @ whiten


def lda(fold: Fold, shrink: float = 3.0, keep: float = 0.25) -> Transform:
    """Fisher's linear discriminants on the same scatter: the better quarter of the directions.

    Half would be no cut: 99.9998% of the variance of these embeddings is in half of the dimensions.
    """
    _, centre, within, between = _scatters(fold)
    dim = len(within)
    whiten = _power(within + shrink * np.trace(within) / dim * np.eye(dim), -0.5)
    _, vectors = np.linalg.eigh(whiten @ between @ whiten)
    project = whiten @ vectors[:, ::-1][:, : int(keep * dim)]
    return lambda rows: (_unit(rows) - centre) @ project


def plda(fold: Fold, shrink: float = 1.0) -> Transform:
    """The posterior mean of the identity under the two-covariance model (Brümmer, de Villiers 2010), by cosine."""
    _, centre, within, between = _scatters(fold)
    dim = len(within)
    whiten = _power(within + shrink * np.trace(within) / dim * np.eye(dim), -0.5)
    values, vectors = np.linalg.eigh(whiten @ between @ whiten)
    values = np.maximum(values, 0)
    project = whiten @ (vectors * (values / (values + 1)))
    return lambda rows: (_unit(rows) - centre) @ project


def ridge_gate(fold: Fold, shrink: float = 0.3, strength: float = 0.3) -> Transform:
    """Ridge regression from a profile row to its subject's mean frontal one, mixed in as far as a row looks profile."""
    rows = fold.train
    x, profile = _unit(rows.x), rows.classes == PROFILE
    paired = np.isin(rows.subjects, np.unique(rows.subjects[profile]))
    targets = {
        name: x[paired & ~profile & (rows.subjects == name)].mean(0) for name in np.unique(rows.subjects[profile])
    }
    known = profile & np.isin(rows.subjects, [name for name, mean in targets.items() if np.isfinite(mean).all()])
    source, target = x[known], np.stack([targets[name] for name in rows.subjects[known]])
    source_mean, target_mean = source.mean(0), target.mean(0)
    centred = source - source_mean
    dim = x.shape[1]
    gram = centred.T @ centred + shrink * len(centred) / dim * np.eye(dim)
    regress = np.linalg.solve(gram, centred.T @ (target - target_mean))
    pose = LogisticRegression(C=1e-3, class_weight="balanced", max_iter=300).fit(x[paired] * dim**0.5, profile[paired])

    def transform(new: np.ndarray) -> np.ndarray:
        unit = _unit(new)
        gate = strength * pose.predict_proba(unit * dim**0.5)[:, 1:]
        return unit + gate * (_unit(target_mean + (unit - source_mean) @ regress) - unit)

    return transform


CLASSICAL: Mapping[str, Callable[[Fold], Transform]] = {
    "WCCN": wccn,
    "LDA": lda,
    "PLDA": plda,
    "ridge and pose gate": ridge_gate,
}


def _scatters(fold: Fold) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return unit rows, the centre between both views, within-subject scatter across views, and between scatter."""
    rows = fold.train
    x, profile = _unit(rows.x), rows.classes == PROFILE
    centre = (x[profile].mean(0) + x[~profile].mean(0)) / 2
    names, code = np.unique(rows.subjects, return_inverse=True)
    means = np.stack([x[code == number].mean(0) for number in range(len(names))])
    within, seen = np.zeros((x.shape[1], x.shape[1])), 0
    for number in range(len(names)):
        mine = code == number
        front, side = x[mine & ~profile], x[mine & profile]
        if len(front) and len(side):
            across = front.mean(0) - side.mean(0)
            within += (np.cov(front.T, bias=True) + np.cov(side.T, bias=True) + np.outer(across, across)) / 2
            seen += 1
    centred = means - centre
    return x, centre, within / seen, centred.T @ centred / len(centred)


def _unit(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def _power(symmetric: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * np.maximum(values, 1e-12) ** exponent) @ vectors.T
