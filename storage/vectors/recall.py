"""Recall of an index: the share of the true neighbours that it finds, measured before a release is served.

Which queries are asked is left to the caller.
"""

from dataclasses import dataclass

import numpy as np

from storage.vectors.exact import nearest, unit_rows
from storage.vectors.index import VectorIndex
from storage.vectors.refined import LEAST_CANDIDATES
from storage.vectors.training import Batches

CANDIDATES = (8, 16, 32)
"""How many candidates for each neighbour a search of a refined kind may score."""
CANDIDATE_ROWS = 300
"""To score a candidate takes as long as to visit so many rows (512 numbers, docs/index.md)."""


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
            visits and how many candidates it scores, and the others measure.
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
    for keys, vectors in rows:
        best = nearest(best, vectors, keys, queries, k)
    return best[1]


def _tune(index: VectorIndex, queries: np.ndarray, true: np.ndarray, wanted: float) -> None:
    """Visit the fewest lists, and score the fewest candidates, that reach `wanted` recall@10.

    Of several such pairs the cheapest is taken. Where none does, because compressed scores or the share of the lists
    keep all below, the cheapest that comes within a hundredth of the best.
    """
    found: dict[tuple[int, int | None], float] = {}
    for lists in _steps(index.lists):
        index.visit(lists)
        proposed = index.candidates(queries, CANDIDATES[-1] * true.shape[1])
        if proposed is None:
            found[lists, None] = best = _recall(index, queries, true).at_10
        else:
            hits = (proposed[:, :, None] == true[:, None, :]).any(axis=2)
            # A row is found where it is among the candidates: their scores are exact.
            for each in CANDIDATES:
                found[lists, each] = hits[:, : max(LEAST_CANDIDATES, each * true.shape[1])].sum() / true.size
            best = found[lists, CANDIDATES[0]]
        if best >= wanted:
            break
    goal = min(wanted, 0.99 * max(found.values()))
    rows_of_list = len(index) / index.lists
    lists, proposals = min(
        (pair for pair, recall in found.items() if recall >= goal),
        key=lambda pair: pair[0] * rows_of_list + true.shape[1] * CANDIDATE_ROWS * (pair[1] or 0),
    )
    index.visit(lists)
    if proposals is not None:
        index.propose(proposals)


def _steps(lists: int) -> list[int]:
    """Return how many lists may be visited: 1, 2, 3, 4, 6, 8, 12 … up to half of them."""
    steps = sorted({part for power in range(lists.bit_length()) for part in (2**power, 3 * 2**power // 2)})
    return [step for step in steps if step <= max(1, lists // 2)]


def _recall(index: VectorIndex, queries: np.ndarray, true: np.ndarray) -> Recall:
    _, answers = index.search(queries, true.shape[1])
    hits = (answers[:, :, None] == true[:, None, :]) & (answers[:, :, None] >= 0)
    return Recall(float(hits[:, 0, 0].mean()), float(hits.any(axis=2).mean()), len(queries))
