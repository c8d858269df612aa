"""Search: the nearest stored rows of vectors, with filters, query expansion and subject templates.

The order of work: the rows that may be found (`where`), expansion of the queries, search, then what is left out of the
answer. Where rows are left out, the search goes deeper until there are k neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypedDict

import numpy as np
import pyarrow as pa

from metrics.expansion import expanded
from schemas.errors import SettingsError
from schemas.settings import MAX_EXPAND
from storage.vectors.exact import unit_rows
from storage.vectors.index import VectorIndex
from tasks.query.candidates import Candidates
from tasks.query.rows import StoredRows, slices
from tasks.query.templates import Templates

MAX_K = 10_000
_BLOCK_NUMBERS = 2**22  # of vectors at once


class SearchOptions(TypedDict, total=False):
    """The options of `Index.search`, to be passed on."""

    expand: int | None
    where: str | None
    exclude_self_ids: Sequence[str | int | None] | None
    unique_subject: bool
    min_score: float | None
    columns: Sequence[str]
    by: Literal["row", "subject"]


@dataclass(frozen=True)
class Neighbours:
    """The neighbours of n queries, best first, `[n, k]` each; a query with fewer is filled up with None and −inf.

    Attributes:
        release: the release that was searched.
        mode: its mode.
        scores: float32, cosine of the query, as it was passed, and the row; with expansion not ordered by it.
        expanded: float32, cosine of the expanded query and the row, which is what they are ordered by; None without
            expansion.
        table: the stored columns of all `n·k` neighbours, query by query, null where there is none: `id`, `subject`,
            `shard` and what was asked for; of templates `id` (the subject), `subject` and `rows`.
        compared: with how many rows, or templates, each query was compared.
    """

    release: str
    mode: str
    scores: np.ndarray
    expanded: np.ndarray | None
    table: pa.Table
    compared: int

    @cached_property
    def ids(self) -> np.ndarray:
        """The ids, an object array; subjects where templates were searched."""
        return self._objects("id")

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The columns of `table` beside `id`, object arrays by name."""
        return {name: self._objects(name) for name in self.table.column_names if name != "id"}

    def __len__(self) -> int:
        return len(self.scores)

    def part(self, start: int, stop: int) -> "Neighbours":
        """Return the neighbours of the queries from `start` up to `stop`."""
        k = self.scores.shape[1]
        return replace(
            self,
            scores=self.scores[start:stop],
            expanded=None if self.expanded is None else self.expanded[start:stop],
            table=self.table.slice(start * k, (stop - start) * k),
        )

    def _objects(self, name: str) -> np.ndarray:
        values = np.empty(self.scores.size, object)
        values[:] = self.table[name].to_pylist()
        return values.reshape(self.scores.shape)


class Index:
    """The index of one mode of one release. Threads may share it.

    Attributes:
        release: name of the release.
        mode: its mode.
        expand: query expansion where a search does not say: `[query] expand` of the release.
    """

    def __init__(self, release: str, mode: str, index: VectorIndex, rows: StoredRows, expand: int = 0) -> None:
        self.release, self.mode, self.expand = release, mode, expand
        self._index, self._rows = index, rows

    def __len__(self) -> int:
        return len(self._index)

    @property
    def dim(self) -> int:
        """Numbers in a vector, D."""
        return self._index.dim

    @property
    def column_names(self) -> list[str]:
        """The columns that `where` and `columns` may name."""
        return self._rows.column_names

    def keep_columns(self, names: Sequence[str]) -> None:
        """Read some columns of all rows into memory; otherwise a search that returns them reads them from the store.

        Raises:
            SettingsError: a name is no column.
            StoreError: a feature file is damaged or missing.
        """
        self._rows.keep(names)

    def search(
        self,
        vectors: np.ndarray,
        k: int,
        *,
        expand: int | None = None,
        where: str | None = None,
        exclude_self_ids: Sequence[str | int | None] | None = None,
        unique_subject: bool = False,
        min_score: float | None = None,
        columns: Sequence[str] = (),
        by: Literal["row", "subject"] = "row",
    ) -> Neighbours:
        """Return the `k` nearest rows of each vector by cosine.

        Args:
            vectors: features of this mode `[n, D]`, of any length but zero; new embeddings go through `reweight` first.
            k: neighbours a query, 1 to 10,000.
            expand: α-query expansion with so many nearest rows (`metrics.expansion`), 0 for none; None takes that of
                the index, for a search by subject none.
            where: an SQL condition over stored columns (`tasks.query.where`); only rows for which it is true are
                searched, and used by `expand`.
            exclude_self_ids: for each query the id of a row that it may not find, or None.
            unique_subject: keep the best row of each subject. A row without a subject counts as one of its own.
            min_score: leave out rows with a smaller score.
            columns: stored columns to return beside id, subject and shard.
            by: "row", or "subject": the neighbours are subjects, each the mean of its normalised rows (a template). A
                query that `exclude_self_ids` names is taken out of its own subject's.

        Raises:
            SettingsError: an option or a vector that cannot be used.
            StoreError: a feature file that is needed is damaged or missing.
        """
        if not 1 <= k <= MAX_K:
            raise SettingsError(f"k {k}: must be 1 to {MAX_K}.")
        if expand is None:
            expand = self.expand if by == "row" else 0
        if not 0 <= expand <= MAX_EXPAND:
            raise SettingsError(f"expand {expand}: must be 0 (none) to {MAX_EXPAND}.")
        if by not in ("row", "subject"):
            raise SettingsError(f"by {by}: must be row or subject.")
        if by == "subject" and (expand or columns):
            raise SettingsError("by subject: a template has no columns, and queries are not expanded with templates.")
        queries = unit_rows(np.asarray(vectors), self.dim)
        self._rows.check_columns(columns)
        own = self._own(exclude_self_ids, len(queries))
        chosen = None if where is None else self._rows.matching(where)
        if by == "subject":
            return self._search_templates(queries, k, own, chosen, min_score)
        candidates = Candidates(self._index, self._rows, chosen)
        keys_of_own = None if own is None else np.where(own < 0, -1, self._rows.keys[own])
        searched = self._expand(candidates, queries, keys_of_own, expand) if expand else queries
        scores, keys = candidates.nearest(searched, k, keys_of_own, unique_subject)
        ranked = None
        if expand:
            ranked, scores = scores, _cosines(candidates, queries, keys)
        scores, keys, ranked = _left(scores, keys, ranked, min_score)
        numbers = np.where(keys < 0, -1, self._rows.numbers(keys))
        table = self._rows.columns(list(dict.fromkeys(["id", "subject", "shard", *columns])), numbers.ravel())
        compared = len(self) if chosen is None else len(chosen)
        return Neighbours(self.release, self.mode, scores, ranked, table, compared)

    def vectors_at(self, rows: np.ndarray) -> np.ndarray:
        """Return the features of stored rows, by their numbers, at length 1, float32 `[n, D]`.

        Raises:
            StoreError: a feature file that is needed is damaged or missing.
        """
        return Candidates(self._index, self._rows).vectors(self._rows.keys[rows])

    @cached_property
    def _templates(self) -> Templates:
        return Templates(self._rows, Candidates(self._index, self._rows).vectors, None, self.dim)

    def _own(self, ids: Sequence[str | int | None] | None, count: int) -> np.ndarray | None:
        """Return the row number of each query's own id, −1 where it is not stored."""
        if ids is None:
            return None
        if len(ids) != count:
            raise SettingsError(f"exclude_self_ids: has {len(ids)} ids for {count} queries.")
        return self._rows.find_exactly(ids)

    def _expand(self, candidates: Candidates, queries: np.ndarray, own: np.ndarray | None, rows: int) -> np.ndarray:
        scores, keys = candidates.nearest(queries, rows, own)
        moved = np.empty_like(queries)
        for part in slices(np.arange(len(queries)), max(1, _BLOCK_NUMBERS // (rows * self.dim))):
            moved[part] = expanded(queries[part], _vectors_of(candidates, keys[part], self.dim), scores[part])
        return moved

    def _search_templates(
        self, queries: np.ndarray, k: int, own: np.ndarray | None, chosen: np.ndarray | None, min_score: float | None
    ) -> Neighbours:
        rows = self._rows
        templates = self._templates
        if chosen is not None:
            templates = Templates(rows, Candidates(self._index, rows).vectors, chosen, self.dim)
        none = np.full(len(queries), -1, np.int64)
        scores, found = templates.nearest(queries, k, none if own is None else own)
        scores, found = _left(scores, found, None, min_score)[:2]
        at = pa.array(found.ravel(), mask=found.ravel() < 0)
        subjects = pa.array(rows.subject_names, pa.string()).take(pa.array(templates.codes).take(at))
        table = pa.table({"id": subjects, "subject": subjects, "rows": pa.array(templates.counts).take(at)})
        return Neighbours(self.release, self.mode, scores, None, table, len(templates.counts))


def _left(
    scores: np.ndarray, keys: np.ndarray, ranked: np.ndarray | None, min_score: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Leave out rows with too small a score; the others move up."""
    if min_score is None:
        return scores, keys, ranked
    kept = (keys >= 0) & (scores >= min_score)
    order = np.argsort(~kept, axis=1, kind="stable")
    scores, keys = np.where(kept, scores, -np.inf), np.where(kept, keys, -1)
    moved = None if ranked is None else np.take_along_axis(np.where(kept, ranked, -np.inf), order, 1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(keys, order, 1), moved


def _cosines(candidates: Candidates, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the cosine of each query and the rows found for it, −inf for key −1."""
    scores = np.empty(keys.shape, np.float32)
    dim = queries.shape[1]
    for part in slices(np.arange(len(queries)), max(1, _BLOCK_NUMBERS // (keys.shape[1] * dim))):
        rows = _vectors_of(candidates, keys[part], dim).astype(np.float64)
        scores[part] = np.where(keys[part] < 0, -np.inf, np.vecdot(rows, queries[part, None].astype(np.float64)))
    return scores


def _vectors_of(candidates: Candidates, keys: np.ndarray, dim: int) -> np.ndarray:
    """Return `[n, k, D]` for keys `[n, k]`; zeros for key −1."""
    found = np.zeros((*keys.shape, dim), np.float32)
    present = keys >= 0
    if present.any():
        distinct, back = np.unique(keys[present], return_inverse=True)
        found[present] = candidates.vectors(distinct)[back]
    return found
