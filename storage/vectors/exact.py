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
_UNIT_NUMBERS = 2**16  # likewise, where it is used again and again: 512 KiB stay in the cache
_COMPARED_ROWS = 8192


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
    step = max(1, _UNIT_NUMBERS // dim)
    work = np.empty((min(step, len(vectors)), dim))
    for start in range(0, len(vectors), step):
        wide = work[: len(vectors) - start]
        np.copyto(wide, vectors[start : start + step])
        lengths = np.sqrt(np.vecdot(wide, wide))
        bad = np.flatnonzero(~((lengths > 0) & np.isfinite(lengths)))
        if len(bad):
            at = start + int(bad[0])
            row = f"query vector {at}" if keys is None else f"the vector of key {keys[at]}"
            raise refuse(f"{row} is zero or not finite, so it has no direction; leave it out or embed it again")
        np.divide(wide, lengths[:, None], out=wide)
        unit[start : start + step] = wide
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


def nearest(best: Best, rows: np.ndarray, keys: np.ndarray, queries: np.ndarray, k: int) -> Best:
    """Return the `k` best of what was found so far and of further rows, scored and ordered as in `exact_search`.

    A float32 product of all pairs, which is off by at most slack = D·2⁻²³, leaves out what cannot be among the best.

    Args:
        best: of each query `[n, …]`, in order; no columns at the start.
        rows: unit vectors, float32 `[rows, D]`.
        keys: int64 `[rows]`.
        queries: unit vectors, float32 `[n, D]`.
        k: how many are wanted.
    """
    slack = rows.shape[1] * 2.0**-23
    for start in range(0, len(rows), _COMPARED_ROWS):
        part = rows[start : start + _COMPARED_ROWS]
        rough = queries @ part.T
        lowest = best[0][:, k - 1] if best[0].shape[1] == k else np.full(len(queries), -np.inf)
        if len(part) >= k and not np.isfinite(lowest).all():
            lowest = np.maximum(lowest, np.partition(rough, -k, axis=1)[:, -k])
        query, row = np.nonzero(rough >= (lowest - 2 * slack)[:, None])
        step = max(1, _BLOCK_NUMBERS // rows.shape[1])
        exact = [_scores(part[row[s : s + step]], queries[query[s : s + step]]) for s in range(0, len(row), step)]
        found = np.bincount(query, minlength=len(queries))
        place = np.arange(len(query)) - (np.cumsum(found) - found)[query]
        scores = np.full((len(queries), found.max(initial=0)), -np.inf, np.float32)
        there = np.full(scores.shape, -1, np.int64)
        if exact:
            scores[query, place], there[query, place] = np.concatenate(exact), keys[start + row]
        best = merge_best(best, (scores, there), k)
    return best


def rescore(rows: np.ndarray, keys: np.ndarray, queries: np.ndarray, at: np.ndarray, k: int) -> Best:
    """Return the `k` best of each query's candidates, scored as in `exact_search`.

    Float32 scores choose a few more than `k` first. Where the last of these comes within 2·slack of the k-th, the query
    is scored with all candidates.

    Args:
        rows: unit vectors, float32 `[rows, D]`.
        keys: int64 `[rows]`.
        queries: unit vectors, float32 `[n, D]`.
        at: row numbers of the candidates, int64 `[n, candidates]`, each once; negative ones stand for none.
        k: at most the number of candidates; where there are fewer, the rest has score −inf and key −1.
    """
    chosen = k + max(8, k // 8)
    if chosen >= at.shape[1]:
        return _rescored(rows, keys, queries, at, k)
    at, queries = np.ascontiguousarray(at, np.int64), np.ascontiguousarray(queries)
    rough = np.empty(at.shape, np.float32)
    faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined]
        *map(faiss.swig_ptr, (rough, queries, rows, at)), rows.shape[1], *at.shape
    )
    first = np.argpartition(-rough, chosen - 1, axis=1)[:, :chosen]
    best = _rescored(rows, keys, queries, np.take_along_axis(at, first, 1), k)
    kept = np.sort(np.take_along_axis(rough, first, 1), axis=1)[:, ::-1]
    near = kept[:, -1] >= kept[:, k - 1] - 2 * rows.shape[1] * 2.0**-23
    for query in np.flatnonzero(near & np.isfinite(kept[:, -1])):
        part = slice(query, query + 1)
        best[0][part], best[1][part] = _rescored(rows, keys, queries[part], at[part], k)
    return best


def _rescored(rows: np.ndarray, keys: np.ndarray, queries: np.ndarray, at: np.ndarray, k: int) -> Best:
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
