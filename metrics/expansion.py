"""α-weighted query expansion: a query is moved towards its nearest stored rows before it is searched again.

Chum et al., "Total Recall", ICCV 2007, average a query with its nearest results; Radenović et al., "Fine-tuning CNN
Image Retrieval with No Human Annotation", IEEE TPAMI 41(7), 2018, weight each result by its cosine to a power α. Labels
play no part. Which rows are nearest is left to the caller.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ALPHA = 3.0
"""The power of Radenović et al. for their networks."""


def expanded(
    queries: NDArray[np.floating[Any]],
    rows: NDArray[np.floating[Any]],
    scores: NDArray[np.floating[Any]],
    alpha: float = ALPHA,
) -> NDArray[np.float32]:
    """Return the expanded queries, float32 `[n, D]`, at length 1.

        q' = q + Σ max(0, q·x_i)^α x_i, divided by its length

    Args:
        queries: unit vectors `[n, D]`.
        rows: unit vectors of the m nearest rows of each query, `[n, m, D]`.
        scores: their cosines to the query, `[n, m]`; −inf stands for no row, and a negative cosine has weight 0.
        alpha: 0 gives each row that is not opposed to the query the weight of the query itself.

    >>> expanded(np.array([[1.0, 0.0]]), np.array([[[0.6, 0.8]]]), np.array([[0.6]]), alpha=0)
    array([[0.8944272, 0.4472136]], dtype=float32)
    """
    positive = scores > 0
    weights = np.where(positive, np.where(positive, scores, 1.0).astype(np.float64) ** alpha, 0.0)
    moved = queries + np.einsum("nm,nmd->nd", weights, rows, dtype=np.float64)
    unit: NDArray[np.float32] = (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)
    return unit
