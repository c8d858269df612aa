"""The score of a pair: the cosine of two features in float32, on a fixed grid.

A score is clipped to [-1, 1] and rounded to a multiple of 2^-22 (2.4e-7). The summation order of a float32 matrix
product already moves a cosine by as much. With the grid a tie is a tie whatever the block size, all scores fit into a
table of 2^23 + 1 counters, and statistics of billions of pairs are exact without sorting them.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

SCORES_PER_UNIT = 2**22  # the spacing of float32 between 2 and 4: adding 3 to a cosine rounds it to the grid
Features = NDArray[np.floating[Any]] | torch.Tensor
_ROWS_AT_ONCE = 8192


def unit_rows(features: Features, device: str = "cpu", order: NDArray[np.integer[Any]] | None = None) -> torch.Tensor:
    """Return a float32 copy `[N, D]` on `device` with every row divided by its L2 norm (taken in float64).

    With `order`, row i of the copy is row `order[i]` of `features`.

    Raises ValueError for another shape, and for a row that is zero or not finite: such rows belong into quarantine.

    >>> unit_rows(np.array([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    if features.ndim != 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; pass [rows, dimension]")
    numbers = np.arange(len(features)) if order is None else order
    unit = torch.empty((len(numbers), features.shape[1]), dtype=torch.float32, device=device)
    for start in range(0, len(numbers), _ROWS_AT_ONCE):
        chunk = numbers[start : start + _ROWS_AT_ONCE]
        rows = (
            _copy_of_rows(features, chunk).to(device).double()
        )  # in this order: a GPU converts faster, from half the bytes
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        bad = ~(torch.isfinite(norms) & (norms > 0)).squeeze(1)
        if bad.any():
            raise ValueError(f"feature row {chunk[int(bad.nonzero()[0])]} is zero or not finite; leave such rows out")
        unit[start : start + len(rows)] = rows / norms
    return unit


def _copy_of_rows(features: Features, numbers: NDArray[np.integer[Any]]) -> torch.Tensor:
    """NumPy copies before torch sees it: arrays that come from Arrow are read-only, which torch warns about."""
    if isinstance(features, torch.Tensor):
        return features[torch.from_numpy(numbers.copy()).to(features.device)]
    return torch.from_numpy(features[numbers])


def shift_to_grid(cosines: torch.Tensor) -> torch.Tensor:
    """Add 3 in place, clipped to [2, 4]: float32 rounds this to the grid, and its bits then count grid steps."""
    return cosines.add_(3.0).clamp_(2.0, 4.0)


def pair_scores(
    features: Features, first: NDArray[np.integer[Any]], second: NDArray[np.integer[Any]]
) -> NDArray[np.float32]:
    """Return the score of row `first[i]` with row `second[i]` of `features`, float32 `[pairs]`.

        score(x, y) = x·y / (|x| |y|), clipped to [-1, 1] and rounded to a multiple of 2^-22

    Args:
        features: `[N, D]`, any float type, not normalised.
        first: integer row numbers `[pairs]`.
        second: integer row numbers `[pairs]`.

    Raises ValueError as `unit_rows` does, or when the two lists of row numbers differ in length.

    >>> pair_scores(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]), np.array([0, 0]), np.array([1, 2]))
    array([1., 0.], dtype=float32)
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"row numbers have shapes {first.shape} and {second.shape}; pass two lists of one length")
    unit = unit_rows(features)
    scores = torch.empty(len(first))
    for start in range(0, len(first), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        scores[part] = torch.linalg.vecdot(_copy_of_rows(unit, first[part]), _copy_of_rows(unit, second[part]))
    return np.asarray((shift_to_grid(scores) - 3.0).numpy())
