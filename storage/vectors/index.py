"""The nearest-neighbour index: FAISS over unit vectors with stable 64-bit keys, so that cosine is an inner product.

An index is chosen, built from a stream of batches, updated, searched, written and read back. How well it searches is
`storage.vectors.recall`; which id a key stands for is `storage.ids`.
"""

from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import faiss
import numpy as np

from schemas.errors import SettingsError, StoreError
from schemas.index import IndexSettings
from storage.vectors.exact import Best, exact_search, order_best, unit_rows
from storage.vectors.files import Written, read_faiss, write_faiss
from storage.vectors.refined import K_FACTOR, Refined, list_keys, remove_from_lists
from storage.vectors.training import (
    ITERATIONS,
    ROWS_PER_LIST,
    Batch,
    Batches,
    check_keys,
    lists_of,
    read_all,
    refuse_other_count,
    train,
    training_rows,
    training_sample,
)

EXACT_KIND = "Flat"
EXACT_ROWS = 262_144
"""Up to here "auto" compares with every row: at 512 numbers one query takes 0.09 s on two cores (measured)."""
WHOLE_ROWS = 32_768  # of a batch of `whole_rows`
KEY_BYTES = 72
"""A key costs 8 bytes in an array, 8 in a list or none, and 56 in a hash map."""


def choose_factory(rows: int, dim: int, settings: IndexSettings) -> str:
    """Return the `faiss.index_factory` string for `rows` vectors of `dim` numbers.

    A string in the settings is taken as it is. "auto" gives the first of these that fits the memory budget:

    - `Flat`, up to `EXACT_ROWS` rows: exact, no training;
    - `PCAR…,IVF…,PQ…x4fs,RFlat`: vectors are projected to their D/2 main directions and become codes of half a byte for
      four numbers, in lists of which a search visits some; they propose candidates, and the vectors beside them score
      these exactly (4.1·D bytes a row; where eight does not divide D: `IVF…,Flat`);
    - `IVF…,SQ8`: a byte for a number (D bytes a row);
    - `IVF…,PQ…`: D/2, D/4, … down to D/32 bytes a row, as far as D divides.

    The number of lists is the power of two at or below 1.5·√rows, as far as `training_rows` feed so many clusters.

    Raises:
        SettingsError: FAISS does not know the string, or it cannot hold `dim` numbers or inner products; or no kind
            fits the budget.
    """
    if settings.factory != "auto":
        _empty_index(settings.factory, dim)
        return settings.factory
    budget = settings.memory_budget_gb * 1e9
    if rows <= EXACT_ROWS and rows * (4 * dim + KEY_BYTES) <= budget:
        return EXACT_KIND
    lists = _power_of_two_below(min(1.5 * rows**0.5, min(rows, settings.training_rows) / ROWS_PER_LIST))
    codes = {f"PQ{dim // part}": dim // part for part in (2, 4, 8, 16, 32) if dim % part == 0}
    kinds = {f"IVF{lists},Flat": 4 * dim}
    if dim % 8 == 0:
        kinds = {f"PCAR{dim // 2},IVF{lists},PQ{dim // 8}x4fs,RFlat": 4 * dim + dim // 16 + KEY_BYTES}
    kinds |= {f"IVF{lists},{name}": code_bytes for name, code_bytes in ({"SQ8": dim} | codes).items()}
    for name, code_bytes in kinds.items():
        needed = rows * (code_bytes + 8) + lists * dim * 4
        if needed <= budget:
            return name
    raise SettingsError(
        f"memory_budget_gb = {settings.memory_budget_gb:g} is too small for {rows:,} vectors of {dim} numbers: the "
        f"most compressed kind needs {needed / 1e9:.3g} GB; raise memory_budget_gb, or set factory yourself"
    )


def build(batches: Batches, rows: int, dim: int, settings: IndexSettings) -> "VectorIndex":
    """Build an index of the kind that `choose_factory` gives, trained on a random sample over all batches.

    The sample (`training_rows` of them, without replacement) and the clustering are drawn from `settings.seed`: the
    same batches give the same bytes, except from kinds that grow a graph in parallel (HNSW, NSG). A refined kind holds
    all vectors in any case, so it reads the batches once and is trained from memory. No rows give an empty exact index.

    Args:
        batches: gives a fresh pass over all rows; vectors are normalised here.
        rows: how many rows come.
        dim: D.
        settings: kind, budget, seed.

    Raises:
        SettingsError: see `choose_factory`; or too few rows to train the kind asked for.
        StoreError: a vector is zero, not finite or of another length; a key comes twice or is negative; the stream does
            not have `rows` rows.
    """
    factory = choose_factory(rows, dim, settings) if rows else EXACT_KIND
    index = _empty_index(factory, dim)
    _tune(index, settings)
    refined = Refined.of(index)
    if refined is not None:
        vectors, all_keys = refined.reserve(rows), np.empty(rows, np.int64)
        read_all(batches, vectors, all_keys)
        train(refined.codes, np.take(vectors, training_rows(refined.codes, rows, settings), axis=0), factory, settings)
        refined.fill(all_keys)
        _refuse_repeated(all_keys)
        return VectorIndex(index)
    if not index.is_trained:
        sample = training_sample(batches, rows, dim, training_rows(index, rows, settings))
        train(index, sample, factory, settings)
        del sample
    seen = [np.empty(0, np.int64)]
    for keys, vectors in batches():
        check_keys(keys, vectors)
        index.add_with_ids(unit_rows(vectors, dim, keys), keys)
        seen.append(keys.copy())
    all_keys = np.concatenate(seen)
    refuse_other_count(rows, len(all_keys))
    _refuse_repeated(all_keys)
    return VectorIndex(index)


class VectorIndex:
    """A trained index: `search`, `update`, `write`; made by `build` or `read_index`."""

    def __init__(self, index: Any) -> None:
        self._index = index
        inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap2) else None
        self._flat = inner if isinstance(inner, faiss.IndexFlat) else None
        self._refined = Refined.of(index)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Numbers in a vector, D."""
        return int(self._index.d)

    @property
    def is_exact(self) -> bool:
        """Whether a search compares with every row, uncompressed."""
        return self._flat is not None

    @property
    def can_update(self) -> bool:
        """Whether rows can be removed; graphs (HNSW, NSG) and compressed refinements cannot, and are rebuilt."""
        if self._refined is not None:
            return self._refined.can_remove
        try:
            self._index.remove_ids(np.empty(0, np.int64))
        except RuntimeError:  # FAISS: "remove_ids not implemented for this type of index"
            return False
        return True

    def keys(self) -> np.ndarray:
        """Return the keys of all rows, ascending."""
        if isinstance(self._index, faiss.IndexIDMap2):
            return np.sort(faiss.vector_to_array(self._index.id_map))
        return np.sort(np.concatenate([np.empty(0, np.int64), *list_keys(lists_of(self._index))]))

    @property
    def lists(self) -> int:
        """How many inverted lists there are; 0 for kinds without."""
        lists = lists_of(self._index)
        return 0 if lists is None else int(lists.nlist)

    def visit(self, lists: int) -> None:
        """Let a search visit so many lists; the number is kept in the file."""
        faiss.extract_index_ivf(self._index).nprobe = lists

    def propose(self, candidates: int) -> None:
        """Let a search of a refined kind score so many candidates for each neighbour; kept in the file likewise."""
        assert self._refined is not None
        self._refined.propose(candidates)

    def candidates(self, queries: np.ndarray, count: int) -> np.ndarray | None:
        """Return the keys that the codes of a refined kind propose to unit vectors, best first; None for other kinds.

        A search scores the first of these, so it finds a neighbour if and only if that is among them.
        """
        return None if self._refined is None else self._refined.candidates(queries, count)

    def whole_rows(self) -> Iterator[Batch] | None:
        """Yield keys and unit vectors where the index holds them uncompressed; None for other kinds.

        They are views, which the next change of the index makes invalid.
        """
        if self._refined is not None:
            keys, vectors = self._refined.keys, self._refined.vectors
            return (
                (keys[at : at + WHOLE_ROWS], vectors[at : at + WHOLE_ROWS]) for at in range(0, len(keys), WHOLE_ROWS)
            )
        if type(self._index) is not faiss.IndexIVFFlat:
            return None
        return ((keys, codes.view(np.float32).reshape(-1, self.dim)) for keys, codes in _listed(self._index))

    def vectors(self, keys: np.ndarray) -> np.ndarray | None:
        """Return the unit vectors of some keys, float32 `[n, D]`; None for kinds that do not hold them uncompressed."""
        if self._flat is None and self._refined is None:
            return None
        found: np.ndarray = self._index.reconstruct_batch(np.ascontiguousarray(keys, np.int64))
        return found

    def search(self, vectors: np.ndarray, k: int) -> Best:
        """Return the `k` rows of highest cosine for each query, best first.

        An exact index answers from the two vectors alone: scores are the float64 inner product rounded to float32,
        equal scores go to the smaller key, and neither batch size, threads nor the order in which rows were added
        matter. Refined kinds score and order their candidates in the same way. Other kinds return FAISS's scores, equal
        ones ordered by key.

        Args:
            vectors: queries `[n, D]`, any length but zero.
            k: neighbours wanted, at least 1; it may exceed the number of rows.

        Returns:
            Scores, float32 `[n, k]`, and keys, int64 `[n, k]`; where there is no further neighbour, −inf and −1.

        Raises:
            SettingsError: a query is zero or not finite, or has another length than D.
        """
        if k < 1:
            raise ValueError(f"search: k is {k}, at least one neighbour is meant")
        queries = unit_rows(vectors, self.dim)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        keys = np.full((len(queries), k), -1, np.int64)
        found = min(k, len(self))
        if found and len(queries):
            if self._flat is not None:
                row_keys = faiss.rev_swig_ptr(self._index.id_map.data(), len(self))
                scores[:, :found], keys[:, :found] = exact_search(self._flat, row_keys, queries, found)
            elif self._refined is not None:
                scores[:, :found], keys[:, :found] = self._refined.search(queries, found)
            else:
                found_scores, found_keys = self._index.search(queries, found)
                found_scores[found_keys < 0] = -np.inf
                scores[:, :found], keys[:, :found] = order_best(found_scores, found_keys)
        return scores, keys

    def update(self, removed: np.ndarray, batches: Iterable[Batch] = ()) -> None:
        """Remove rows, then add others, in place; an added key that is present replaces its row.

        An exact index then answers as one built from the remaining rows; other kinds keep the lists and codes of their
        training, so they drift from a rebuild (see `rebuild_reason`). After an error the index may be half changed:
        read it again.

        Args:
            removed: int64 `[m]`; missing keys are ignored.
            batches: one pass over the rows to add.

        Raises:
            StoreError: the kind cannot remove; or a row is refused as in `build`.
        """
        if not self.can_update:
            raise StoreError(f"an index of kind {type(self._index).__name__} cannot remove rows; rebuild it")
        self._remove(removed)
        for keys, vectors in batches:
            check_keys(keys, vectors)
            _refuse_repeated(keys)
            unit = unit_rows(vectors, self.dim, keys)
            self._remove(keys)
            self._index.add_with_ids(unit, keys)

    def _remove(self, keys: np.ndarray) -> None:
        keys = np.ascontiguousarray(keys, np.int64)
        if self._refined is not None:
            self._refined.remove(keys)
        else:
            remove_from_lists(self._index, keys)

    def write(self, file: BinaryIO) -> Written:
        """Stream the index into `file` (any object with `write`), hashing on the way."""
        return write_faiss(self._index, file)


def read_index(file: BinaryIO, digest: str, max_bytes: int, name: str = "index") -> VectorIndex:
    """Read what `VectorIndex.write` wrote; see `storage.vectors.files.read_faiss` for how it is verified.

    Args:
        file: seekable, at its start.
        digest: `Written.digest`, as recorded in the release.
        max_bytes: what may be read; a longer file is refused without reading on.
        name: how messages call the file.

    Raises:
        StoreError: too long, another digest, or not an index of this program.
    """
    index = read_faiss(file, digest, max_bytes, name)
    if index.metric_type != faiss.METRIC_INNER_PRODUCT or not _holds_keys(index):
        raise StoreError(
            f"{name} is an index of kind {type(index).__name__} without inner product or keys; build it again"
        )
    refined = Refined.of(index)
    if isinstance(index, faiss.IndexIDMap2) and not (
        index.id_map.size() == index.ntotal == index.index.ntotal and (refined is None or refined.is_consistent())
    ):
        raise StoreError(f"{name}: its keys are not those of its rows; build the index again")
    return VectorIndex(index)


def rebuild_reason(
    index: VectorIndex, factory: str, rows: int, changed_rows: int, settings: IndexSettings
) -> str | None:
    """Return why `index` should be built again rather than updated, or None.

    Args:
        index: the one to be updated.
        factory: the string it was built from.
        rows: how many it will hold.
        changed_rows: rows removed or added since it was trained, those to come included.
        settings: those of today.
    """
    wanted = choose_factory(rows, index.dim, settings) if rows else EXACT_KIND
    if wanted != factory:
        return f"it is of kind {factory}, {rows:,} rows want {wanted}"
    if not index.can_update:
        return f"kind {factory} cannot remove rows"
    if not index.is_exact and changed_rows > settings.rebuild_share * rows:
        return f"{changed_rows:,} rows changed since its training, more than {settings.rebuild_share:.0%} of {rows:,}"
    return None


def _empty_index(factory: str, dim: int) -> Any:
    """Return an untrained index that takes vectors with keys, or refuse the string."""
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).rsplit(": ", 1)[-1]
        raise SettingsError(
            f"factory = {factory!r}: FAISS cannot make such an index of {dim} numbers with inner product ({reason}); "
            'use "auto", or a string that faiss.index_factory knows, such as "Flat" or "IVF4096,SQ8"'
        ) from error
    if isinstance(index, faiss.IndexIDMap):
        raise SettingsError(f"factory = {factory!r}: leave the IDMap out, keys are kept in any case")
    if isinstance(index, faiss.IndexRefineFlat):
        index.k_factor = K_FACTOR
    return index if _holds_keys(index) else faiss.IndexIDMap2(index)


def _holds_keys(index: Any) -> bool:
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return isinstance(index, faiss.IndexIVF | faiss.IndexIDMap2)


def _listed(lists: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield keys and codes, as bytes, of each list that is not empty: views of its memory."""
    held = lists.invlists
    for number in range(lists.nlist):
        if rows := held.list_size(number):
            codes = faiss.rev_swig_ptr(held.get_codes(number), rows * held.code_size)
            yield faiss.rev_swig_ptr(held.get_ids(number), rows), codes


def _tune(index: Any, settings: IndexSettings) -> None:
    """Set what a search visits; FAISS keeps it in the file."""
    lists = lists_of(index)
    if lists is not None:
        # an eighth of the lists, until `storage.vectors.recall` finds how many the wanted recall needs
        lists.nprobe = min(lists.nlist, settings.nprobe or max(16, lists.nlist // 8))
        lists.cp.seed = settings.seed
        lists.cp.niter = ITERATIONS
    graph = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap2) else index
    if isinstance(graph, faiss.IndexHNSW) and settings.ef_search:
        graph.hnsw.efSearch = settings.ef_search


def _refuse_repeated(keys: np.ndarray) -> None:
    ordered = np.sort(keys)
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(repeated):
        raise StoreError(f"key {ordered[repeated[0]]} comes twice; an id may have one row only: find the duplicate id")


def _power_of_two_below(number: float) -> int:
    return 1 << max(0, int(number).bit_length() - 1)
