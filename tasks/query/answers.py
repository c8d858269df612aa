"""The answers to queries by stored id, or by new embeddings from a file: what the command line and the flow return.

Beside each score stands what it means in this release: the FMR at that score, and with a wanted FMR whether it is a
match. `ask` gives all answers as arrays and tables; `record` makes the documents that are printed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, JsonValue

from schemas.errors import SettingsError, StoreError
from schemas.metrics import RAW, measured_modes, rate_text
from storage.query_vectors import read_vectors
from tasks.query.opened import OpenRelease, open_release
from tasks.query.search import MAX_K, Neighbours, SearchOptions

FEW_FALSE_MATCHES = 30
"""An FMR that rests on fewer false matches is unreliable."""
_OWN_COLUMNS = ("id", "subject", "shard", "rows")


class Neighbour(BaseModel):
    """One row found, or with templates one subject.

    Attributes:
        rank: 1 for the first.
        id: of the row; of a template the subject.
        subject: null where unknown.
        shard: of the row.
        score: the cosine to the query.
        expanded: the cosine to the expanded query, by which neighbours are then ordered.
        fmr: at most this share of impostor pairs score as high, in the evaluation of the release; null where that was
            not measured.
        match: whether the score reaches the threshold that was asked for.
        rows: how many rows the template is the mean of.
        columns: further stored columns.
    """

    rank: int
    id: str | int
    subject: str | None
    shard: str | None = None
    score: float
    expanded: float | None = None
    fmr: float | None = None
    match: bool | None = None
    rows: int | None = None
    columns: dict[str, JsonValue] = {}


class QueryResult(BaseModel):
    """The neighbours of one query: a stored id, or the row of a vectors file."""

    query: str | int
    subject: str | None = None
    neighbours: list[Neighbour]


class ModeAnswer(BaseModel):
    """The answer to all queries of one call, in one mode.

    Attributes:
        release: the release that was searched.
        mode: its mode.
        k: neighbours asked for.
        by: what was found: rows, or subjects by their templates.
        expand: rows of query expansion.
        where: the condition on stored columns.
        fmr: what was asked for; `threshold` is the score that gives it.
        threshold: a match scores as high.
        compared: with how many rows, or templates, each query was compared.
        impostor_pairs: from how many the FMR was measured.
        fmr_unknown: why no score has an FMR; null where they have one.
        results: one for each query.
    """

    release: str
    mode: str
    k: int
    by: Literal["row", "subject"] = "row"
    expand: int = 0
    where: str | None = None
    fmr: str | None = None
    threshold: float | None = None
    compared: int
    impostor_pairs: int | None = None
    fmr_unknown: str | None = None
    results: list[QueryResult]


class QueryAnswer(ModeAnswer):
    """The same, and the store that was asked: local path or s3 address."""

    schema_version: Literal[1] = 1
    store: str


class QueryComparison(BaseModel):
    """The answers of raw and of every mode to the same queries."""

    schema_version: Literal[1] = 1
    store: str
    release: str
    answers: dict[str, QueryAnswer]


@dataclass(frozen=True)
class Question:
    """What is asked: stored ids, or a file of new embeddings, and the options.

    Attributes:
        ids: stored ids.
        vectors: `.npy`, `.parquet` or `.csv` of raw embeddings (`storage.query_vectors`).
        k: neighbours a query, 1 to 10,000.
        include_self: whether a row that is asked for by id may find itself.
        exclude_self: whether new embeddings may not find the stored row of their id.
        fmr: FMR whose threshold marks matches.
        options: of the search.

    Raises:
        SettingsError: options that contradict each other.
    """

    ids: Sequence[str] = ()
    vectors: str | None = None
    k: int = 10
    include_self: bool = False
    exclude_self: bool = False
    fmr: str | float | None = None
    options: SearchOptions = field(default_factory=SearchOptions)

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_K:
            raise SettingsError(f"-k {self.k}: must be 1 to {MAX_K}.")
        if bool(self.ids) == bool(self.vectors):
            raise SettingsError("pass either --id or --vectors.")
        if self.include_self and self.exclude_self:
            raise SettingsError("pass either --include-self or --exclude-self.")
        if self.fmr is not None and self.options.get("by") == "subject":
            raise SettingsError("--fmr: FMR is measured on pairs of rows, not on templates; leave out --by subject.")


@dataclass(frozen=True)
class Answered:
    """The answer in one mode, as arrays.

    Attributes:
        store: uri.
        question: what was asked.
        names: of the queries.
        subjects: of the queries, None where unknown.
        found: their neighbours.
        expand: rows of query expansion.
        threshold: of `question.fmr`.
        fmr: at each score, `[n, k]`; None where it is unknown.
        impostor_pairs: from how many it was measured.
        fmr_unknown: why it is unknown.
    """

    store: str
    question: Question
    names: Sequence[str | int]
    subjects: Sequence[str | None]
    found: Neighbours
    expand: int
    threshold: float | None
    fmr: np.ndarray | None
    impostor_pairs: int | None
    fmr_unknown: str | None

    def record(self) -> QueryAnswer:
        """Return the answer as a document."""
        return QueryAnswer(store=self.store, **self._fields())

    def mode_answer(self) -> ModeAnswer:
        """Return the answer as a document that does not name the store."""
        return ModeAnswer(**self._fields())

    def _fields(self) -> dict[str, Any]:
        options, fmr = self.question.options, self.question.fmr
        return {
            "release": self.found.release,
            "mode": self.found.mode,
            "k": self.question.k,
            "by": options.get("by", "row"),
            "expand": self.expand,
            "where": options.get("where"),
            "fmr": None if fmr is None else rate_text(fmr),
            "threshold": self.threshold,
            "compared": self.found.compared,
            "impostor_pairs": self.impostor_pairs,
            "fmr_unknown": self.fmr_unknown,
            "results": [
                QueryResult(query=name, subject=subject, neighbours=self._neighbours(query))
                for query, (name, subject) in enumerate(zip(self.names, self.subjects, strict=True))
            ],
        }

    def _neighbours(self, query: int) -> list[Neighbour]:
        found = self.found
        k = found.scores.shape[1]
        rows = found.table.slice(query * k, k).to_pylist()
        return [
            Neighbour(
                rank=at + 1,
                **{name: row[name] for name in _OWN_COLUMNS if name in row},
                score=float(found.scores[query, at]),
                expanded=None if found.expanded is None else float(found.expanded[query, at]),
                fmr=None if self.fmr is None else float(self.fmr[query, at]),
                match=None if self.threshold is None else bool(found.scores[query, at] >= self.threshold),
                columns={name: _plain(value) for name, value in row.items() if name not in _OWN_COLUMNS},
            )
            for at, row in enumerate(rows)
            if row["id"] is not None
        ]

    def table(self) -> pa.Table:
        """Return one row a neighbour: query, mode, rank, id, score, what is known of it, and the stored columns.

        A stored column with the name of another one gets the prefix `stored_`.
        """
        found = self.found
        n, k = found.scores.shape
        names = [str(name) for name in self.names] if {type(name) for name in self.names} != {int} else self.names
        columns: dict[str, Any] = {
            "query": pa.array(names).take(pa.array(np.repeat(np.arange(n), k))),
            "mode": pa.repeat(pa.scalar(found.mode), n * k),
            "rank": np.tile(np.arange(1, k + 1), n),
            "id": found.table["id"],
            "score": found.scores.ravel(),
        }
        if found.expanded is not None:
            columns["expanded"] = found.expanded.ravel()
        if self.fmr is not None:
            columns["fmr"] = self.fmr.ravel()
        if self.threshold is not None:
            columns["match"] = found.scores.ravel() >= self.threshold
        for name in found.table.column_names:
            if name != "id":
                columns[f"stored_{name}" if name in columns else name] = found.table[name]
        return pa.table(columns).filter(pc.is_valid(found.table["id"]))


def ask(opened: OpenRelease, modes: Sequence[str], question: Question) -> list[Answered]:
    """Answer a question from an open release, in each of some modes.

    Raises:
        SettingsError: an unknown mode, id or column, a file or option that cannot be used.
        StoreError: the index or a feature file is damaged.
    """
    read = None
    if question.vectors is not None:
        read = read_vectors(question.vectors, opened.index(modes[0]).dim)
    return [_ask(opened, mode, question, read) for mode in modes]


def all_modes(opened: OpenRelease) -> list[str]:
    """Return raw and the modes of a release in the order of all tables."""
    return [mode for mode in measured_modes([mode for mode in opened.modes if mode != RAW]) if mode in opened.modes]


def _ask(
    opened: OpenRelease, mode: str, question: Question, read: tuple[list[str | int], np.ndarray] | None
) -> Answered:
    options = question.options.copy()
    index, names, subjects = opened.index(mode), [], []
    if question.fmr is not None:
        opened.threshold(mode, question.fmr)  # refuses before the search
    if read is None:
        rows = opened.rows(mode)
        at = rows.find(question.ids, shown="--id")
        found = opened.neighbours_at(mode, at, question.k, include_self=question.include_self, **options)
        known = rows.columns(["id", "subject"], at)
        names, subjects = known["id"].to_pylist(), known["subject"].to_pylist()
    else:
        names, subjects = read[0], [None] * len(read[0])
        if question.exclude_self:
            options["exclude_self_ids"] = names
        found = index.search(opened.reweight(mode, read[1]), question.k, **options)
    return answered(opened, question, names, subjects, found)


def answered(
    opened: OpenRelease,
    question: Question,
    names: Sequence[str | int],
    subjects: Sequence[str | None],
    found: Neighbours,
) -> Answered:
    """Say what the scores of some neighbours mean.

    Args:
        opened: the release that was searched.
        question: what was asked.
        names: of the queries.
        subjects: of the queries, None where unknown.
        found: their neighbours.

    Raises:
        SettingsError: the FMR that was asked for is not estimable.
        StoreError: it was not measured.
    """
    mode, options = found.mode, question.options
    threshold = None if question.fmr is None else opened.threshold(mode, question.fmr)
    fmr, pairs, unknown = None, None, None
    if options.get("by") == "subject":
        unknown = "FMR is measured on pairs of rows, not on templates"
    else:
        try:
            fmr, pairs = opened.fmr(mode, found.scores), opened.rates(mode).n_impostor
        except StoreError as error:
            unknown = str(error).rstrip(".")
    expand = options.get("expand")
    if expand is None:
        expand = opened.default_expand if found.expanded is not None else 0
    return Answered(opened.store.uri, question, names, subjects, found, expand, threshold, fmr, pairs, unknown)


def answer(
    store: str,
    mode: str,
    *,
    ids: Sequence[str] = (),
    vectors: str | None = None,
    k: int = 10,
    release: str | None = None,
    include_self: bool = False,
) -> QueryAnswer:
    """Return the `k` nearest stored rows of each query by cosine; the arguments are those of `Question`.

    Raises:
        SettingsError: no store there, an unknown mode, id, release or file, or vectors of another length, not finite
            or zero.
        StoreError: nothing is served yet, or the index is damaged.
    """
    question = Question(ids=ids, vectors=vectors, k=k, include_self=include_self)
    return ask(open_release(store, release), [mode], question)[0].record()


def _plain(value: Any) -> JsonValue:
    """Return a stored value as JSON has it: numbers that are not finite are null, what JSON lacks is text."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    return value if isinstance(value, str | int | bool | None) else str(value)
