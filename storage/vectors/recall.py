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


def audit_recall(index: VectorIndex, batches: Batches, queries: np.ndarray) -> Recall:
    """Compare the index with an exact search over the same rows.

    Where the index has its vectors uncompressed, they are taken from it: they are unit rows already. Otherwise they
    come from `batches`; the answer is the same.

    Queries should not be rows of the index: a row finds itself in any kind, so recall@1 would be optimistic. With fewer
    than ten rows recall@10 is over those there are; without rows or queries both are NaN.

    Args:
        index: the one to be served.
        batches: a pass over all rows; one batch at a time is in memory.
        queries: `[n, D]`, held-out vectors.
    """
    k = min(10, len(index))
    if not k or not len(queries):
        return Recall(float("nan"), float("nan"), len(queries))
    unit_queries = unit_rows(queries, index.dim)
    best = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    rows = index.whole_rows() or ((keys, unit_rows(vectors, index.dim, keys)) for keys, vectors in batches())
    for keys, vectors in _joined(rows):
        part = faiss.IndexFlatIP(index.dim)
        part.add(vectors)
        best = merge_best(best, exact_search(part, keys, unit_queries, min(k, len(keys))), k)
    _, answers = index.search(queries, k)
    hits = (answers[:, :, None] == best[1][:, None, :]) & (answers[:, :, None] >= 0)
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
