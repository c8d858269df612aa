"""Query: the nearest features of a stored id, or of new embeddings, in the release that is served.

New embeddings go through the same model and mode as the index. A query reads one release from one commit, so a run that
publishes meanwhile is never seen half.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from schemas.errors import SettingsError, StoreError, clipped
from schemas.identity import parse_id
from schemas.metrics import RAW
from schemas.releases import Release
from storage.features import features_table, matrix_of, read_rows
from storage.ids import id_keys
from storage.location import Location
from storage.query_vectors import read_vectors
from storage.releases import Releases
from storage.tombstones import Tombstones
from storage.vectors.store import open_ids, open_index

MAX_K = 10_000


class Neighbour(BaseModel):
    """One row found: `score` is the cosine to the query, highest first."""

    rank: int
    id: str | int
    subject: str | None
    shard: str
    score: float


class QueryResult(BaseModel):
    """The neighbours of one query: a stored id, or the row of a vectors file."""

    query: str | int
    subject: str | None = None
    neighbours: list[Neighbour]


class QueryAnswer(BaseModel):
    """The answer to all queries of one call."""

    store: str
    release: str
    mode: str
    k: int
    results: list[QueryResult]


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
    """Return the `k` nearest stored rows of each query by cosine.

    Args:
        store: local path or s3://…
        mode: `per_sample`, `batch_stat` or `raw`.
        ids: stored ids.
        vectors: `.npy` (`[D]` or `[n, D]`) or `.parquet` (an `embedding` column, optionally `id`) of raw embeddings.
        k: neighbours a query, 1 to 10,000.
        release: a release by name; None takes the one that is served.
        include_self: whether a row that is asked for by id may find itself.

    Raises:
        SettingsError: no store there, an unknown mode, id, release or file, or vectors of another length, not finite
            or zero.
        StoreError: nothing is served yet, or the index is damaged.
    """
    if not 1 <= k <= MAX_K:
        raise SettingsError(f"-k {k}: must be 1 to {MAX_K}.")
    if bool(ids) == bool(vectors):
        raise SettingsError("pass either --id or --vectors.")
    history = Releases.of(Location(store))
    place, record = history.store, history.servable(release) if release else history.serving()
    Tombstones.proven(place, history.all())
    reference = record.indexes.get(mode)
    if reference is None:
        known = ", ".join(record.indexes)
        raise SettingsError(f"--mode {mode}: release {record.release} has {known}.")
    table = open_ids(place, reference)
    if vectors is not None:
        names, matrix = read_vectors(vectors, reference.dim)
        features, subjects, own = _through_model(place, record, mode, matrix), [None] * len(names), None
    else:
        rows = [_row_of(value, table, store, record) for value in ids]
        names = [table["id"][row].as_py() for row in rows]
        features = np.concatenate([_stored(place, record, mode, table, row) for row in rows])
        subjects = [table["subject"][row].as_py() for row in rows]
        own = None if include_self else [table["key"][row].as_py() for row in rows]
    scores, keys = open_index(place, reference).search(features, min(k + (own is not None), reference.rows))
    results = [
        QueryResult(
            query=name,
            subject=subject,
            neighbours=_neighbours(scores[at], keys[at], table, k, None if own is None else own[at]),
        )
        for at, (name, subject) in enumerate(zip(names, subjects, strict=True))
    ]
    return QueryAnswer(store=store, release=record.release, mode=mode, k=k, results=results)


def _through_model(store: Location, release: Release, mode: str, matrix: np.ndarray) -> np.ndarray:
    if mode == RAW:
        return matrix
    # Only new embeddings need a network: a query by id must not wait for torch to load.
    from models.inference import Reweighter
    from tasks.checkpoints import stored_checkpoint

    model = release.models[mode]
    return Reweighter(stored_checkpoint(store, model), statistic=model.statistic).query(matrix)


def _row_of(value: str, ids: pa.Table, store: str, release: Release) -> int:
    """Return the row of a typed id: of exactly this text, else of one that is equal after normalisation."""
    integer = pa.types.is_integer(ids.schema.field("id").type)
    name = parse_id(value, integer=integer)
    if (row := _row_of_exactly(name if integer else value, ids)) is not None:
        return row
    if not integer:
        column = pc.utf8_trim_whitespace(pc.utf8_normalize(ids["id"], form="NFC"))
        rows = np.flatnonzero(pc.equal(column, pa.scalar(name)).to_numpy())
        if len(rows) == 1:
            return int(rows[0])
        if len(rows):
            raise SettingsError(
                f"--id {clipped(value)}: {len(rows)} ids of release {release.release} differ from it only in blanks or "
                "in how characters are composed; type one of them exactly."
            )
    raise SettingsError(f"--id {clipped(value)}: is not in release {release.release} of {store}.")


def _row_of_exactly(name: str | int, ids: pa.Table) -> int | None:
    key = int(id_keys(pa.array([name]))[0])
    row = int(np.searchsorted(ids["key"].to_numpy(), key))
    found = row < ids.num_rows and ids["key"][row].as_py() == key and ids["id"][row].as_py() == name
    return row if found else None


def _stored(store: Location, release: Release, mode: str, ids: pa.Table, row: int) -> np.ndarray:
    """Return the stored feature `[1, D]` of one row."""
    shard, wanted = ids["shard"][row].as_py(), ids["id"][row]
    table = features_table(store)
    for file in table.snapshot(release.features_version).of_mode(mode):
        if file.shard == shard:
            for batch in read_rows(table, file, ["id", "front"]):
                at = pc.index(batch.column("id"), wanted).as_py()
                if at >= 0:
                    return matrix_of(batch.column("front").slice(at, 1), file.path)
    raise StoreError(f"{store.uri}: index and features of {release.release} disagree; run `frontalis verify`.")


def _neighbours(scores: np.ndarray, keys: np.ndarray, ids: pa.Table, k: int, own: int | None) -> list[Neighbour]:
    found: list[Neighbour] = []
    rows = np.searchsorted(ids["key"].to_numpy(), keys)
    for score, key, row in zip(scores.tolist(), keys.tolist(), rows.tolist(), strict=True):
        if key < 0 or key == own or len(found) == k:
            continue
        found.append(
            Neighbour(
                rank=len(found) + 1,
                id=ids["id"][row].as_py(),
                subject=ids["subject"][row].as_py(),
                shard=ids["shard"][row].as_py(),
                score=score,
            )
        )
    return found
