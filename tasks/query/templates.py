"""Subject templates: a subject is the mean of its rows at length 1, as in the IJB protocols (Whitelam et al., 2017)."""

from collections.abc import Callable

import faiss
import numpy as np

from storage.vectors.exact import Best, exact_search, merge_best, unit_rows
from tasks.query.candidates import BLOCK_ROWS
from tasks.query.rows import StoredRows, slices


class Templates:
    """The templates of the subjects of some rows. Rows without a subject are in none.

    Args:
        rows: all rows of the mode.
        vectors: gives the unit vectors of some keys.
        chosen: numbers of the rows that templates are made of; None for all.
        dim: D.

    Attributes:
        codes: the subject code of each template, ascending.
        counts: how many rows it is the mean of.
    """

    def __init__(
        self, rows: StoredRows, vectors: Callable[[np.ndarray], np.ndarray], chosen: np.ndarray | None, dim: int
    ) -> None:
        self._rows, self._vectors = rows, vectors
        codes = rows.subject_codes
        self._member = codes >= 0
        if chosen is not None:
            passes = np.zeros(len(rows), bool)
            passes[chosen] = True
            self._member &= passes
        members = np.flatnonzero(self._member)
        self.codes, place, self.counts = np.unique(codes[members], return_inverse=True, return_counts=True)
        self._sums = np.zeros((len(self.codes), dim), np.float32)
        by_shard = np.argsort(rows.shard_codes[members], kind="stable")  # a shard is read once where files are
        for some in slices(by_shard, BLOCK_ROWS):
            some = some[np.argsort(place[some], kind="stable")]
            edges = np.flatnonzero(np.diff(place[some], prepend=-1))
            self._sums[place[some][edges]] += np.add.reduceat(vectors(rows.keys[members[some]]), edges, axis=0)
        self._flat = faiss.IndexFlatIP(dim)
        self._numbers = np.flatnonzero(np.linalg.norm(self._sums, axis=1) > 1e-6)  # rows that cancel have no direction
        if len(self._numbers):
            self._flat.add(unit_rows(self._sums[self._numbers], dim))

    def nearest(self, queries: np.ndarray, k: int, own: np.ndarray) -> Best:
        """Return scores and numbers of the `k` nearest templates of each query, best first, then −inf and −1.

        Args:
            queries: unit vectors, float32 `[n, D]`.
            k: templates wanted.
            own: row number `[n]` of a row that is taken out of the template of its subject, −1 for none.
        """
        scores = np.full((len(queries), k + 1), -np.inf, np.float32)
        found = np.full((len(queries), k + 1), -1, np.int64)
        depth = min(k + 1, len(self._numbers))
        if depth:
            scores[:, :depth], found[:, :depth] = exact_search(self._flat, self._numbers, queries, depth)
        corrected = np.flatnonzero((own >= 0) & self._member[own])
        if len(corrected):
            self._without_own(queries, corrected, own, scores, found)
        return scores[:, :k], found[:, :k]

    def _without_own(
        self, queries: np.ndarray, at: np.ndarray, own: np.ndarray, scores: np.ndarray, found: np.ndarray
    ) -> None:
        """Score the query's own subject again without its own row."""
        number = np.searchsorted(self.codes, self._rows.subject_codes[own[at]])
        rest = self._sums[number].astype(np.float64) - self._vectors(self._rows.keys[own[at]])
        lengths = np.linalg.norm(rest, axis=1)
        usable = (self.counts[number] > 1) & (lengths > 1e-6)
        cosine = np.vecdot(queries[at], rest) / np.where(usable, lengths, 1.0)
        old = found[at] == number[:, None]
        others = np.where(old, -np.inf, scores[at]).astype(np.float32), np.where(old, -1, found[at])
        own_score, own_number = np.where(usable, cosine, -np.inf).astype(np.float32), np.where(usable, number, -1)
        scores[at], found[at] = merge_best(others, (own_score[:, None], own_number[:, None]), scores.shape[1])
