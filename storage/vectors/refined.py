"""Fast-scan codes that propose candidates, and the unit vectors beside them that score these exactly.

A FAISS kind that ends in `,RFlat` holds both: an index over compressed codes, whose labels are row numbers, and an
`IndexFlat` of the rows. `IndexIDMap2` around it maps row numbers to keys. FAISS fills and searches this structure, but
cannot remove rows from it; and its scores are of float32. Both are done here.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import faiss
import numpy as np

from storage.vectors.exact import Best, rescore

K_FACTOR = 8
"""Candidates for each neighbour wanted, until `storage.vectors.recall` finds how many the wanted recall needs."""
LEAST_CANDIDATES = 64
_ADDED_ROWS = 65_536


class Refined:
    """View of an `IndexIDMap2` over an `IndexRefineFlat`; the index itself is changed in place."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self._refine = _downcast(index.index)
        self.codes = _downcast(self._refine.base_index)
        self._flat = _downcast(self._refine.refine_index)

    @staticmethod
    def of(index: Any) -> "Refined | None":
        """Return the view of an index, or None where it is of another kind."""
        inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap2) else None
        return Refined(index) if isinstance(inner, faiss.IndexRefineFlat) else None

    @property
    def vectors(self) -> np.ndarray:
        """The unit vectors, float32 `[n, D]`: a view that the next change makes invalid."""
        flat = self._flat
        view: np.ndarray = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
        return view

    @property
    def keys(self) -> np.ndarray:
        """The keys of `vectors`, int64 `[n]`: a view likewise."""
        view: np.ndarray = faiss.rev_swig_ptr(self._index.id_map.data(), self._index.ntotal)
        return view

    @property
    def can_remove(self) -> bool:
        """Whether the codes are in lists from which rows can be removed."""
        if faiss.try_extract_index_ivf(self.codes) is None:
            return False
        try:
            self.codes.remove_ids(np.empty(0, np.int64))
        except RuntimeError:
            return False
        return True

    def is_consistent(self) -> bool:
        """Return whether codes, vectors and keys are of the same rows, so that no label is outside of them."""
        rows = self._index.ntotal
        same = self._refine.ntotal == self.codes.ntotal == self._flat.ntotal == self._index.id_map.size() == rows
        return same and all(ids.min() >= 0 and ids.max() < rows for ids in self._labels())

    def reserve(self, rows: int) -> np.ndarray:
        """Make room for all rows of a new index and return its `vectors`, to be filled: growing would copy them."""
        self._flat.codes.resize(rows * self._flat.d * 4)
        self._flat.ntotal = rows
        return self.vectors

    def fill(self, keys: np.ndarray) -> None:
        """Add the codes of the reserved vectors; the codes are trained, the vectors filled."""
        vectors = self.vectors
        for start in range(0, len(vectors), _ADDED_ROWS):
            self.codes.add(vectors[start : start + _ADDED_ROWS])
        self._refine.is_trained = True
        self._set_rows(keys)

    def propose(self, candidates: int) -> None:
        """Let a search score so many candidates for each neighbour wanted."""
        self._refine.k_factor = candidates

    def candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Return the keys that the codes propose to unit vectors, int64 `[n, count]`, best first, −1 for none."""
        _, at = self.codes.search(queries, min(self._index.ntotal, count))
        return np.where(at < 0, -1, self.keys[at])

    def search(self, queries: np.ndarray, k: int) -> Best:
        """Return the `k` best candidates of each query, scored and ordered as `exact_search` does.

        Args:
            queries: unit vectors, float32 `[n, D]`.
            k: at most the number of rows.
        """
        candidates = min(self._index.ntotal, max(LEAST_CANDIDATES, round(k * self._refine.k_factor)))
        _, at = self.codes.search(queries, candidates)
        return rescore(self.vectors, self.keys, queries, at, k)

    def remove(self, keys: np.ndarray) -> None:
        """Remove the rows of some keys; missing keys are ignored. The rows behind them move up."""
        gone = np.flatnonzero(np.isin(self.keys, keys))
        if not len(gone):
            return
        kept = np.delete(self.keys, gone)
        remove_from_lists(self.codes, gone)
        self._flat.remove_ids(gone)
        for labels in self._labels():
            labels -= np.searchsorted(gone, labels)
        self._set_rows(kept)

    def _set_rows(self, keys: np.ndarray) -> None:
        faiss.copy_array_to_vector(np.ascontiguousarray(keys), self._index.id_map)
        self._index.ntotal = self._refine.ntotal = len(keys)
        self._index.construct_rev_map()

    def _labels(self) -> Iterable[np.ndarray]:
        """Yield the row numbers in each list of the codes, as views of its memory."""
        return list_keys(faiss.try_extract_index_ivf(self.codes))


def list_keys(lists: Any | None) -> Iterator[np.ndarray]:
    """Yield the labels of each inverted list that is not empty, int64, as views of its memory."""
    if lists is None:
        return
    held = lists.invlists  # codes are not looked at: not every kind gives them as bytes
    for number in range(lists.nlist):
        if rows := held.list_size(number):
            yield faiss.rev_swig_ptr(held.get_ids(number), rows)


def remove_from_lists(index: Any, labels: np.ndarray) -> None:
    """Remove labels from an index, so that rows can be added after it.

    Fast-scan lists hold codes in blocks, and FAISS adds a code to a block that is not full by a bitwise OR: what a
    removal leaves behind the last row must be zero.
    """
    index.remove_ids(labels)
    lists: Any | None = faiss.try_extract_index_ivf(index)
    if lists is None:
        return
    held: Any = faiss.downcast_InvertedLists(lists.invlists)
    if not isinstance(held, faiss.BlockInvertedLists):  # type: ignore[attr-defined]
        return
    packer: Any = held.packer
    nothing = np.zeros(packer.code_size, np.uint8)
    for number in range(lists.nlist):
        blocks, used = divmod(held.list_size(number), packer.nvec)
        if used:
            codes = faiss.rev_swig_ptr(held.get_codes(number), (blocks + 1) * packer.block_size)
            last = codes.reshape(blocks + 1, packer.block_size)[blocks:]
            for place in range(used, packer.nvec):
                packer.pack_1(nothing, place, last)


def _downcast(index: Any) -> Any:
    return faiss.downcast_index(index)
