"""The answer to queries by stored id, or by new embeddings from a file: what the command line and the flow return.

Beside each score stands what it means in this release: the FMR at that score, and with a wanted FMR whether it is a
match.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, JsonValue

from schemas.errors import SettingsError, StoreError
from schemas.metrics import rate_text
from storage.query_vectors import read_vectors
from tasks.query.opened import OpenRelease, open_release
from tasks.query.search import MAX_K, Neighbours, SearchOptions


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


class QueryAnswer(BaseModel):
    """The answer to all queries of one call, in one mode.

    Attributes:
        fmr: what was asked for; `threshold` is the score that gives it.
        fmr_unknown: why no score has an FMR; null where they have one.
    """

    store: str
    release: str
    mode: str
    k: int
    by: Literal["row", "subject"] = "row"
    expand: int = 0
    where: str | None = None
    fmr: str | None = None
    threshold: float | None = None
    fmr_unknown: str | None = None
    results: list[QueryResult]


@dataclass(frozen=True)
class Question:
    """What is asked: stored ids, or a file of new embeddings, and the options.

    Attributes:
        ids: stored ids.
        vectors: `.npy` (`[D]` or `[n, D]`), `.parquet` (an `embedding` column, optionally `id`) or `.csv` of raw
            embeddings.
        k: neighbours a query, 1 to 10,000.
        include_self: whether a row that is asked for by id may find itself.
        exclude_self: whether new embeddings with the id of a stored row may not find it.
        fmr: FMR whose threshold marks matches.
        options: of the search.
    """

    ids: Sequence[str] = ()
    vectors: str | None = None
    k: int = 10
    include_self: bool = False
    exclude_self: bool = False
    fmr: str | float | None = None
    options: SearchOptions = field(default_factory=SearchOptions)

    def check(self) -> None:
        """Refuse what cannot be asked with a SettingsError."""
        if not 1 <= self.k <= MAX_K:
            raise SettingsError(f"-k {self.k}: must be 1 to {MAX_K}.")
        if bool(self.ids) == bool(self.vectors):
            raise SettingsError("pass either --id or --vectors.")
        if self.include_self and self.exclude_self:
            raise SettingsError("pass either --include-self or --exclude-self.")
        if self.fmr is not None and self.options.get("by") == "subject":
            raise SettingsError("--fmr: the FMR was measured on pairs of rows and not of templates; leave out --by.")


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
    question.check()
    return answer_from(open_release(store, release), mode, question)


def answer_from(opened: OpenRelease, mode: str, question: Question) -> QueryAnswer:
    """Answer a question from an open release, in one mode. Raises as `answer`."""
    question.check()
    by, expand = question.options.get("by", "row"), question.options.get("expand") or 0
    threshold = None if question.fmr is None else opened.threshold(mode, question.fmr)
    names, subjects, found = _search(opened, mode, question)
    fmr, unknown = _fmr(opened, mode, found, by)
    return QueryAnswer(
        store=opened.store.uri,
        release=found.release,
        mode=mode,
        k=question.k,
        by=by,
        expand=expand,
        where=question.options.get("where"),
        fmr=None if question.fmr is None else rate_text(question.fmr),
        threshold=threshold,
        fmr_unknown=unknown,
        results=[
            QueryResult(query=name, subject=subject, neighbours=list(_neighbours(found, at, fmr, threshold)))
            for at, (name, subject) in enumerate(zip(names, subjects, strict=True))
        ],
    )


def _search(
    opened: OpenRelease, mode: str, question: Question
) -> tuple[Sequence[str | int], Sequence[str | None], Neighbours]:
    """Return the names and subjects of the queries, and their neighbours."""
    index = opened.index(mode)
    if question.vectors is None:
        rows = opened.rows(mode)
        at = rows.find(question.ids, shown="--id")
        found = opened.neighbours_at(mode, at, question.k, include_self=question.include_self, **question.options)
        known = rows.columns(["id", "subject"], at)
        return known["id"].to_pylist(), known["subject"].to_pylist(), found
    names, matrix = read_vectors(question.vectors, index.dim)
    options = question.options.copy()
    if question.exclude_self:
        options["exclude_self_ids"] = names
    found = index.search(opened.reweight(mode, matrix), question.k, **options)
    return names, [None] * len(names), found


def _fmr(opened: OpenRelease, mode: str, found: Neighbours, by: str) -> tuple[np.ndarray | None, str | None]:
    if by == "subject":
        return None, "the FMR was measured on pairs of rows and not of templates"
    try:
        return opened.fmr(mode, found.scores), None
    except StoreError as error:
        return None, str(error)


def _neighbours(found: Neighbours, query: int, fmr: np.ndarray | None, threshold: float | None) -> Any:
    columns = {name: values[query] for name, values in found.columns.items() if name not in _OWN_FIELDS}
    for at, name in enumerate(found.ids[query]):
        if name is None:
            return
        score = float(found.scores[query, at])
        yield Neighbour(
            rank=at + 1,
            id=name,
            subject=found.columns["subject"][query, at],
            shard=found.columns["shard"][query, at] if "shard" in found.columns else None,
            score=score,
            expanded=None if found.expanded is None else float(found.expanded[query, at]),
            fmr=None if fmr is None else float(fmr[query, at]),
            match=None if threshold is None else score >= threshold,
            rows=found.columns["rows"][query, at] if "rows" in found.columns else None,
            columns={column: _plain(values[at]) for column, values in columns.items()},
        )


_OWN_FIELDS = ("subject", "shard", "rows")


def _plain(value: Any) -> JsonValue:
    """Return a stored value as JSON has it: dates and decimals as text, numbers that are not finite as null."""
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, date | datetime | time | Decimal):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)
