"""Pose classes of rows: by label where there is one, else by the size of the yaw angle.

What is measured for each pair of classes, and the cells' names, is left to `allpairs`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.metrics import POSE_CLASSES

FRONTAL, HALF, PROFILE, UNKNOWN = range(len(POSE_CLASSES))  # codes into POSE_CLASSES

# Left and right are one class: the cells are about how far a face is turned.
POSE_LABELS: Mapping[str, str] = {
    "frontal": "frontal",
    "half": "half",
    "left": "profile",
    "right": "profile",
    "profile": "profile",
}


def pose_classes(
    labels: Sequence[str | None] | None,
    yaw: NDArray[np.floating[Any]] | None = None,
    *,
    mapping: Mapping[str, str] = POSE_LABELS,
    edges: tuple[float, float] = (15.0, 35.0),
) -> NDArray[np.int64]:
    """Return a code into `POSE_CLASSES` for every row, int64 `[N]`.

    A label of `mapping` decides, in upper or lower case. Without one (None, or a word not in the mapping) the yaw
    decides:

        |yaw| <= edges[0]             frontal
        edges[0] < |yaw| < edges[1]   half
        |yaw| >= edges[1]             profile
        no label and no finite yaw    unknown

    A missing yaw is never taken for 0.

    Args:
        labels: `[N]`, None where there is no label.
        yaw: float `[N]`, degrees, NaN where it is not known.
        mapping: label in lower case → pose class.
        edges: two angles in degrees.

    Raises ValueError when neither labels nor yaw are given or their lengths differ, for edges that do not rise, and for
    a mapping to something that is no pose class.

    >>> [POSE_CLASSES[code] for code in pose_classes(["left", None, None, None], np.array([0, 15, 20, np.nan]))]
    ['profile', 'frontal', 'half', 'unknown']
    """
    if not 0 <= edges[0] < edges[1]:
        raise ValueError(f"edges {edges} do not rise from 0; pass two angles in degrees, such as (15, 35)")
    if strange := set(mapping.values()) - set(POSE_CLASSES):
        raise ValueError(f"the mapping names {sorted(strange)}; the pose classes are {POSE_CLASSES}")
    by_yaw = None if yaw is None else _by_yaw(np.asarray(yaw, dtype=np.float64), edges)
    if labels is None:
        if by_yaw is None:
            raise ValueError("pass labels, yaw, or both")
        return by_yaw
    code_of = {label.lower(): POSE_CLASSES.index(name) for label, name in mapping.items()}
    by_label = np.array([code_of.get(label.lower(), UNKNOWN) if label else UNKNOWN for label in labels], dtype=np.int64)
    if by_yaw is None:
        return by_label
    if len(by_yaw) != len(by_label):
        raise ValueError(f"{len(by_label)} labels, but {len(by_yaw)} yaw angles")
    return np.where(by_label == UNKNOWN, by_yaw, by_label)


def _by_yaw(yaw: NDArray[np.float64], edges: tuple[float, float]) -> NDArray[np.int64]:
    angle = np.abs(yaw)
    classes = np.where(angle <= edges[0], FRONTAL, np.where(angle < edges[1], HALF, PROFILE))
    return np.where(np.isfinite(yaw), classes, UNKNOWN).astype(np.int64)
