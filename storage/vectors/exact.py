"""Exact nearest neighbours whose answers depend on the vectors alone.

FAISS's own scores change in the last bit with batch size, threads and the place of a row, and among equal scores it
returns an arbitrary choice. Here FAISS only proposes candidates; scores and order are computed in float64.
"""

from typing import Any

import faiss
import numpy as np

from schemas.errors import SettingsError, StoreError

Best = tuple[np.ndarray, np.ndarray]
"""Scores, float32 `[n, k]`, highest first, and keys, int64 `[n, k]`, equal scores by key."""

_BLOCK_NUMBERS = 2**22  # numbers of a float64 work array: 32 MiB


def unit_rows(vectors: np.ndarray, dim: int, keys: np.ndarray | None = None) -> np.ndarray:
    """Return `vectors` `[n, dim]` at length 1, float32, each row rounded once from float64 whatever its neighbours are.

    Args:
        vectors: floats `[n, dim]`.
        dim: D, of the index.
        keys: of the rows, for the message; without them, rows are called query vectors.

    Raises:
        SettingsError: a query has another length, or is zero or not finite.
        StoreError: the same of a row with a key.
    """
    refuse = SettingsError if keys is None else StoreError
    what = "query vectors" if keys is None else "vectors to be indexed"
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise refuse(f"{what} have shape {list(vectors.shape)}, the index wants [n, {dim}]")
    unit = np.empty(vectors.shape, np.float32)
    step = max(1, _BLOCK_NUMBERS // dim)
    for start in range(0, len(vectors), step):
        wide = vectors[start : start + step].astype(np.float64)
        lengths = np.sqrt(np.vecdot(wide, wide))
        bad = np.flatnonzero(~((lengths > 0) & np.isfinite(lengths)))
        if len(bad):
            at = start + int(bad[0])
            row = f"query vector {at}" if keys is None else f"the vector of key {keys[at]}"
            raise refuse(f"{row} is zero or not finite, so it has no direction; leave it out or embed it again")
        unit[start : start + step] = wide / lengths[:, None]
    return unit


def exact_search(flat: Any, keys: np.ndarray, queries: np.ndarray, k: int) -> Best:
    """Return the `k` best rows of `flat` for each query, by inner product rounded from float64, equal ones by key.

    FAISS is asked for a few rows more than `k`. Its float32 score of two unit vectors is off by at most slack = D·2⁻²³,
    so a row that it left out can only matter where its last score comes within `slack` of the k-th; those few queries
    are asked again for all rows down to that score.

    Args:
        flat: a `faiss.IndexFlat` over unit vectors, inner product.
        keys: int64 `[rows]`, in the order of its rows.
        queries: unit vectors, float32 `[n, D]`.
        k: at most the number of rows.
    """
    rows = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
    slack, step = flat.d * 2.0**-23, max(1, _BLOCK_NUMBERS // flat.d)
    proposed = min(k + max(16, k // 8), flat.ntotal)
    proposed_scores, proposed_at = flat.search(queries, proposed)
    best_scores, best_keys = rescore(rows, keys, queries, proposed_at, k)
    if proposed < flat.ntotal:
        for query in np.flatnonzero(proposed_scores[:, -1] >= best_scores[:, -1] - 2 * slack):
            _, _, at = flat.range_search(queries[query : query + 1], float(best_scores[query, -1]) - slack)
            scores = np.concatenate([_scores(rows[at[s : s + step]], queries[query]) for s in range(0, len(at), step)])
            found = order_best(scores[None], keys[at][None])
            best_scores[query], best_keys[query] = found[0][0, :k], found[1][0, :k]
    return best_scores, best_keys


def rescore(rows: np.ndarray, keys: np.ndarray, queries: np.ndarray, at: np.ndarray, k: int) -> Best:
    """Return the `k` best of each query's candidates, scored as in `exact_search`.

    Args:
        rows: unit vectors, float32 `[rows, D]`.
        keys: int64 `[rows]`.
        queries: unit vectors, float32 `[n, D]`.
        at: row numbers of the candidates, int64 `[n, candidates]`, each once; negative ones stand for none.
        k: at most the number of candidates; where there are fewer, the rest has score −inf and key −1.
    """
    scores, found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    step = max(1, _BLOCK_NUMBERS // (at.shape[1] * rows.shape[1]))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        none = at[part] < 0
        ordered = order_best(
            np.where(none, -np.inf, _scores(rows[at[part]], queries[part, None])).astype(np.float32),
            np.where(none, -1, keys[at[part]]),
        )
        scores[part], found[part] = ordered[0][:, :k], ordered[1][:, :k]
    return scores, found


def order_best(scores: np.ndarray, keys: np.ndarray) -> Best:
    """Return each row of `[n, k]` in order: highest score first, equal scores by smaller key."""
    order = np.lexsort((keys, -scores), axis=-1)
    return np.take_along_axis(scores, order, -1), np.take_along_axis(keys, order, -1)


def merge_best(left: Best, right: Best, k: int) -> Best:
    """Return the `k` best of two answers to the same queries."""
    scores, keys = order_best(np.hstack([left[0], right[0]]), np.hstack([left[1], right[1]]))
    return scores[:, :k], keys[:, :k]


def _scores(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    exact: np.ndarray = np.vecdot(rows.astype(np.float64), queries.astype(np.float64))
    return exact.astype(np.float32)
