"""The rows that a search may find, and the nearest of them.

Rows that may not be found (a filter, the query itself, further rows of a subject) are left out of what the index
returns, and the search goes deeper until there are enough. Where a filter leaves few rows, these are compared one by
one: no index has to be searched for them.
"""

import faiss
import numpy as np

from storage.vectors.exact import Best, exact_search, merge_best, unit_rows
from storage.vectors.index import VectorIndex
from tasks.query.rows import StoredRows, slices

FEW_ROWS = 65_536
"""So few rows that pass a filter are compared one by one; for more of them the index is searched at most so deep."""
BLOCK_ROWS = 32_768
_BLOCK_NUMBERS = 2**22  # of scores and keys at once


class Candidates:
    """The rows of an index, or those among them that pass a filter.

    Args:
        index: the index.
        rows: its rows.
        chosen: numbers of the rows that pass, ascending; None for all.
    """

    def __init__(self, index: VectorIndex, rows: StoredRows, chosen: np.ndarray | None = None) -> None:
        self._index, self._rows = index, rows
        self._chosen = chosen
        self._passes = np.ones(0, bool)
        if chosen is not None:
            self._passes = np.zeros(len(rows), bool)
            self._passes[chosen] = True

    def vectors(self, keys: np.ndarray) -> np.ndarray:
        """Return the unit vectors of some keys, float32 `[n, D]`; read from the features where the index lacks them."""
        found = self._index.vectors(keys)
        if found is None:
            found = unit_rows(self._rows.vectors(self._rows.numbers(keys)), self._index.dim, keys)
        return found

    def nearest(self, queries: np.ndarray, k: int, own: np.ndarray | None = None, unique_subject: bool = False) -> Best:
        """Return scores and keys of the `k` nearest rows of each query, best first, then −inf and −1.

        Args:
            queries: unit vectors, float32 `[n, D]`.
            k: neighbours wanted.
            own: key `[n]` of a row that a query may not find, −1 for none.
            unique_subject: keep the best row of each subject; a row without a subject counts as one of its own.
        """
        best = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        everybody = np.arange(len(queries))
        deep = (k + (own is not None)) * (4 if unique_subject else 1)
        if self._chosen is None:
            self._deepen(best, everybody, queries, deep, own, unique_subject)
        elif len(self._chosen) <= FEW_ROWS:
            self._compare(best, everybody, queries, deep, own, unique_subject)
        else:
            share = len(self._chosen) / len(self._rows)
            left = self._deepen(best, everybody, queries, int(1.5 * deep / share), own, unique_subject)
            self._compare(best, left, queries, deep, own, unique_subject)
        return best

    def _deepen(
        self, best: Best, todo: np.ndarray, queries: np.ndarray, depth: int, own: np.ndarray | None, unique: bool
    ) -> np.ndarray:
        """Search the index ever deeper, fill `best`, and return the queries for which it did not give enough."""
        given_up = [np.empty(0, np.int64)]
        total = len(self._index) if self._chosen is None else min(len(self._index), FEW_ROWS)
        while len(todo):
            depth, short = min(depth, total), [np.empty(0, np.int64)]
            for part in slices(todo, max(1, _BLOCK_NUMBERS // depth)):
                scores, keys = self._index.search(queries[part], depth)
                lacking = self._fill(best, part, scores, keys, own, unique)
                ended = (keys[:, -1] < 0) | (depth == total)  # an approximate index visits some lists only
                short.append(part[lacking & ~ended])
                given_up.append(part[lacking & ended])
            todo, depth = np.concatenate(short), 4 * depth
        return np.concatenate(given_up)

    def _compare(
        self, best: Best, todo: np.ndarray, queries: np.ndarray, depth: int, own: np.ndarray | None, unique: bool
    ) -> None:
        """Compare with each chosen row, and fill `best`."""
        assert self._chosen is not None
        total = len(self._chosen)
        while len(todo) and total:
            depth, short = min(depth, total), [np.empty(0, np.int64)]
            for part in slices(todo, max(1, _BLOCK_NUMBERS // depth)):
                found = np.empty((len(part), 0), np.float32), np.empty((len(part), 0), np.int64)
                for rows in slices(self._chosen, BLOCK_ROWS):
                    flat, keys = faiss.IndexFlatIP(self._index.dim), self._rows.keys[rows]
                    flat.add(self.vectors(keys))
                    found = merge_best(found, exact_search(flat, keys, queries[part], min(depth, len(rows))), depth)
                lacking = self._fill(best, part, *found, own, unique)
                short.append(part[lacking] if depth < total else part[:0])
            todo, depth = np.concatenate(short), 4 * depth

    def _fill(
        self, best: Best, part: np.ndarray, scores: np.ndarray, keys: np.ndarray, own: np.ndarray | None, unique: bool
    ) -> np.ndarray:
        """Write the first k that may be found into `best`, and return which queries have fewer."""
        may = keys >= 0
        if own is not None:
            may &= keys != own[part, None]
        numbers = self._rows.numbers(keys) if unique or self._chosen is not None else keys
        if self._chosen is not None:
            may &= self._passes[numbers]
        if unique:
            may &= _first_of_each(self._rows.subject_codes[numbers], may)
        k = best[0].shape[1]
        order = np.argsort(~may, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(may, order, 1)
        best[0][part, : order.shape[1]] = np.where(kept, np.take_along_axis(scores, order, 1), -np.inf)
        best[1][part, : order.shape[1]] = np.where(kept, np.take_along_axis(keys, order, 1), -1)
        lacking: np.ndarray = may.sum(axis=1) < k
        return lacking


def _first_of_each(codes: np.ndarray, may: np.ndarray) -> np.ndarray:
    """Mark, in each row of `[n, k]`, the first entry of each code among those that `may` be found."""
    nobody = np.iinfo(np.int64).min + np.arange(codes.shape[1])
    codes = np.where(may, codes, nobody)
    order = np.argsort(codes, axis=1, kind="stable")
    ordered = np.take_along_axis(codes, order, 1)
    starts = np.ones(codes.shape, bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty_like(starts)
    np.put_along_axis(first, order, starts, 1)
    return first
