"""Recall of an index: the share of the true neighbours that it finds, measured before a release is served.

Which queries are asked is left to the caller.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import faiss
import numpy as np

from storage.vectors.exact import exact_search, merge_best, unit_rows
from storage.vectors.index import Batch, Batches, VectorIndex

COMPARED_ROWS = 32_768
"""Half as many at once, or four times as many, took longer (256 queries of 64 numbers)."""


@dataclass(frozen=True)
class Recall:
    """Share of the true 1 and 10 nearest rows that the index returned among its first 1 and 10, mean over queries."""

    at_1: float
    at_10: float
    queries: int


def audit_recall(index: VectorIndex, batches: Batches, queries: np.ndarray, wanted: float | None = None) -> Recall:
    """Compare the index with an exact search over the same rows; with `wanted`, tune it first.

    Where the index has its vectors uncompressed, they are taken from it: they are unit rows already. Otherwise they
    come from `batches`; the answer is the same.

    Queries should not be rows of the index: a row finds itself in any kind, so recall@1 would be optimistic. With fewer
    than ten rows recall@10 is over those there are; without rows or queries both are NaN.

    Args:
        index: the one to be served.
        batches: a pass over all rows; one batch at a time is in memory.
        queries: `[n, D]`, held-out vectors.
        wanted: recall@10. Of an index with inverted lists, every third query then chooses how many lists a search
            visits, and the others measure.
    """
    k = min(10, len(index))
    if not k or not len(queries):
        return Recall(float("nan"), float("nan"), len(queries))
    unit_queries = unit_rows(queries, index.dim)
    true = _nearest(index, batches, unit_queries, k)
    if wanted is not None and index.lists and len(queries) > 2:
        _tune(index, unit_queries[::3], true[::3], wanted)
        measuring = np.arange(len(queries)) % 3 != 0
        unit_queries, true = unit_queries[measuring], true[measuring]
    return _recall(index, unit_queries, true)


def _nearest(index: VectorIndex, batches: Batches, queries: np.ndarray, k: int) -> np.ndarray:
    """Return the keys of the `k` nearest rows of each query, from one pass over all rows."""
    best = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    rows = index.whole_rows() or ((keys, unit_rows(vectors, index.dim, keys)) for keys, vectors in batches())
    for keys, vectors in _joined(rows):
        part = faiss.IndexFlatIP(index.dim)
        part.add(vectors)
        best = merge_best(best, exact_search(part, keys, queries, min(k, len(keys))), k)
    return best[1]


def _tune(index: VectorIndex, queries: np.ndarray, true: np.ndarray, wanted: float) -> None:
    """Visit the fewest lists, of powers of two up to half of them, that reach `wanted` recall.

    Where compressed scores keep all of them below, the fewest that come within a hundredth of the best.
    """
    steps = [2**power for power in range(index.lists.bit_length()) if 2**power <= max(1, index.lists // 2)]
    found: list[float] = []
    for lists in steps:
        index.visit(lists)
        found.append(_recall(index, queries, true).at_10)
        if found[-1] >= wanted:
            break
    goal = min(wanted, 0.99 * max(found))
    index.visit(next(lists for lists, recall in zip(steps, found, strict=False) if recall >= goal))


def _recall(index: VectorIndex, queries: np.ndarray, true: np.ndarray) -> Recall:
    _, answers = index.search(queries, true.shape[1])
    hits = (answers[:, :, None] == true[:, None, :]) & (answers[:, :, None] >= 0)
    return Recall(float(hits[:, 0, 0].mean()), float(hits.any(axis=2).mean()), len(queries))


def _joined(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield several batches at a time."""
    parts: list[Batch] = []
    for batch in batches:
        parts.append(batch)
        if sum(len(keys) for keys, _ in parts) >= COMPARED_ROWS:
            yield _one(parts)
            parts = []
    if parts:
        yield _one(parts)


def _one(parts: list[Batch]) -> Batch:
    keys, vectors = zip(*parts, strict=True)
    return np.concatenate(keys), np.concatenate(vectors)
