"""Index: a FAISS index a mode over the published features, updated where little changed and rebuilt where much did.

`ids.parquet` beside `index.faiss` maps FAISS's 64-bit keys back to id, subject and shard. What the index is
and how it searches is `storage.vectors.index`; which release is served, `tasks.gate`.
"""

import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import StoreError
from schemas.index import IndexSettings
from schemas.releases import IndexRef, ModelRef, Release
from storage.features import check_files, features_table, matrix_of, read_rows, take_rows
from storage.ids import id_keys
from storage.layout import IDS_FILE, INDEX_FILE, index_folder
from storage.location import Location
from storage.parquet import from_parquet, to_parquet
from storage.tables import FileTable, LiveFile, Snapshot
from storage.vectors.exact import unit_rows
from storage.vectors.index import VectorIndex, build, choose_factory, rebuild_reason
from storage.vectors.recall import Recall, audit_recall
from storage.vectors.store import IDS_LIMIT, ids_digest, open_ids, open_index
from storage.vectors.training import Batch

log = logging.getLogger("frontalis.index")

PREVIOUS_RELEASES = 10  # how far back an index to update is looked for
AUDIT_QUERIES = 256
TUNING_QUERIES = 128
QUERY_WINDOW = 2048  # rows of a file, of which queries are made
BATCHES_AHEAD = 2  # read while the last one is worked on
JOINED_ROWS = 16_384  # measured in docs/decisions.md, Incremental
REFERENCE = b"frontalis.index"


@dataclass(frozen=True)
class Previous:
    """An earlier release and the files of its features table, from which an index can be updated."""

    release: Release
    features: Snapshot


def index_mode(
    store: Location, release: str, mode: str, features: Snapshot, settings: IndexSettings, previous: Previous | None
) -> IndexRef:
    """Make the index of one mode of a release, with the least work that gives it.

    In this order: the index is there already (a run was interrupted after it); nothing changed since the previous
    release, so the new one names the same files; a part changed, so the rows of changed shards are removed and added;
    else it is built.

    Raises:
        StoreError: a feature file is damaged or vectors differ in length.
        SettingsError: the factory string is none, or nothing fits the memory budget.
    """
    folder = index_folder(release, mode)
    table = features_table(store)
    files = {file.path: file for file in features.of_mode(mode)}
    done = _finished(store, folder)
    if done is not None and done.rows == sum(file.rows for file in files.values()):
        return done
    old = previous.release.indexes.get(mode) if previous else None
    if previous is not None and old is not None:
        before = {file.path: file for file in previous.features.of_mode(mode)}
        unchanged = list(before) == list(files) and choose_factory(old.rows, old.dim, settings) == old.factory
        if unchanged and _is_whole(store, old):
            return old
        updated = _update(store, folder, table, old, before, files, settings)
        if updated is not None:
            return updated
    check_files(table, files.values())
    ids = _ids_of(table, files.values())
    rows = ids.num_rows
    if not rows:
        raise StoreError(f"{store.uri}: mode {mode} has no row to index; every row of the source is bad or forgotten.")
    dim = _dim(table, files.values())
    index = build(lambda: _ahead(_batches(table, files.values())), rows, dim, settings)
    return _write(store, folder, index, table, files, ids, choose_factory(rows, dim, settings), 0, settings)


def previous_indexes(
    store: Location, releases: Sequence[Release], models: Mapping[str, ModelRef], tombstones: str
) -> dict[str, Previous]:
    """Return, by mode, the latest release whose index can be updated into the next one.

    An index that was trained with vectors of somebody who was forgotten is none of these.
    """
    found: dict[str, Previous] = {}
    for old in reversed(releases[-PREVIOUS_RELEASES:]):
        if old.erased or old.tombstones != tombstones or set(old.indexes) <= set(found):
            continue
        features = release_features(store, old)
        if features is None:
            continue
        for mode in old.indexes:
            if mode not in models or old.models[mode].digest == models[mode].digest:
                found.setdefault(mode, Previous(old, features))
    return found


def release_features(store: Location, release: Release | None) -> Snapshot | None:
    """Return the feature files of a release; None where there is no release or its table version is gone."""
    try:
        return None if release is None else features_table(store).snapshot(release.features_version)
    except StoreError:
        return None


def is_indexed(store: Location, release: Release) -> bool:
    """Return whether the index files of a release are there; where one was lost, a new release builds it again."""
    return all(
        (store / index.path).size() == index.size and (store / index.ids_path).size() is not None
        for index in release.indexes.values()
    )


def _finished(store: Location, folder: str) -> IndexRef | None:
    place = store / f"{folder}/{IDS_FILE}"
    try:
        content = place.read_bytes(IDS_LIMIT)
        # The digest is taken of the bytes as they are, so it finds no damage; reading all of them does.
        metadata = from_parquet(content).select(["key", "id", "subject", "shard"]).schema.metadata or {}
        reference = IndexRef(
            ids_digest=ids_digest(content),
            **json.loads(metadata[REFERENCE]),
        )
        open_index(store, reference)
    except (FileNotFoundError, StoreError, pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None
    return reference


def _is_whole(store: Location, reference: IndexRef) -> bool:
    try:
        open_ids(store, reference)
        open_index(store, reference)
    except StoreError:
        return False
    return True


def _update(
    store: Location,
    folder: str,
    table: FileTable,
    old: IndexRef,
    before: Mapping[str, LiveFile],
    files: Mapping[str, LiveFile],
    settings: IndexSettings,
) -> IndexRef | None:
    gone = {file.shard for path, file in before.items() if path not in files}
    came = [file for path, file in files.items() if path not in before and file.rows]
    moved = sum(file.rows for path, file in before.items() if path not in files) + sum(file.rows for file in came)
    rows = sum(file.rows for file in files.values())
    if moved > settings.rebuild_share * rows:
        return None
    try:
        index = open_index(store, old)
        ids = open_ids(store, old)
    except StoreError as error:
        log.warning("the previous index cannot be updated (%s); building a new one", error)
        return None
    reason = rebuild_reason(index, old.factory, rows, old.changed + moved, settings)
    if reason is not None:
        log.info("building a new index: %s", reason)
        return None
    check_files(table, came)
    leaving = pc.is_in(ids["shard"], pa.array(sorted(gone), pa.string()))
    index.update(ids.filter(leaving)["key"].to_numpy(), _batches(table, came))
    kept = ids.filter(pc.invert(leaving))
    new = pa.concat_tables([kept, _ids_of(table, came)]) if came else kept
    if new.num_rows != rows or not np.array_equal(index.keys(), np.sort(new["key"].to_numpy())):
        log.warning("the previous index does not hold the rows of its release; building a new one")
        return None
    return _write(store, folder, index, table, files, new, old.factory, old.changed + moved, settings)


def _write(
    store: Location,
    folder: str,
    index: VectorIndex,
    table: FileTable,
    files: Mapping[str, LiveFile],
    ids: pa.Table,
    factory: str,
    changed: int,
    settings: IndexSettings,
) -> IndexRef:
    rows = sum(file.rows for file in files.values())
    if not len(index) == ids.num_rows == rows:
        raise StoreError(
            f"{store.uri}/{folder}: {len(index)} vectors and {ids.num_rows} ids for {rows} rows; run again."
        )
    recall = _recall(index, table, files, settings)
    path = f"{folder}/{INDEX_FILE}"
    with (store / path).writing() as file:
        written = index.write(file)
    reference = IndexRef(
        path=path,
        digest=written.digest,
        size=written.size,
        ids_path="",
        ids_digest="",
        rows=len(index),
        dim=index.dim,
        factory=factory,
        changed=changed,
        recall_at_1=recall.at_1,
        recall_at_10=recall.at_10,
        recall_queries=recall.queries,
    )
    return _write_ids(store, folder, ids.sort_by("key"), reference)


def _recall(index: VectorIndex, table: FileTable, files: Mapping[str, LiveFile], settings: IndexSettings) -> Recall:
    """Audit the index on queries that are not its rows: between two neighbouring rows of a file, nearer to one.

    Rows of one subject are neighbours in most shards, so most queries are where real ones are. 256 queries in all; 128
    more tune the index, unless the settings say how many lists a search visits. They are from files drawn at random,
    and from one place in each, so that few pages are read.
    """
    if index.is_exact:
        return Recall(1.0, 1.0, 0)
    wanted = None if settings.nprobe else settings.recall
    queries: list[np.ndarray] = []
    count = AUDIT_QUERIES + (0 if wanted is None else TUNING_QUERIES)
    share = max(1, -(-count // len(files)))
    random = np.random.default_rng(settings.seed)
    for file in random.permutation([file for file in files.values() if file.rows]):  # type: ignore[arg-type]
        if sum(map(len, queries)) >= count:
            break
        window = min(file.rows, QUERY_WINDOW)
        start = int(random.integers(file.rows - window + 1))
        column = take_rows(table, file, ["front"], np.arange(start, start + window))["front"]
        unit = unit_rows(matrix_of(column, file.path), index.dim)
        # A third of the way, so that no two rows are equally near; a lone row has no neighbour.
        usable = 2 * unit[:-1] + unit[1:] if len(unit) > 1 else unit
        queries.append(usable[np.linspace(0, len(usable) - 1, min(share, len(usable))).astype(int)])
    return audit_recall(index, lambda: _batches(table, files.values()), np.concatenate(queries), wanted)


def _write_ids(store: Location, folder: str, ids: pa.Table, reference: IndexRef) -> IndexRef:
    """Write `ids.parquet` last: it says that the index beside it is whole, and what its digest is."""
    paths = {"path": f"{folder}/{INDEX_FILE}", "ids_path": f"{folder}/{IDS_FILE}"}
    reference = reference.replaced(**paths)
    metadata = {REFERENCE: reference.model_dump_json(exclude={"ids_digest"})}
    content = to_parquet(ids.replace_schema_metadata(metadata))
    (store / reference.ids_path).write_bytes(content)
    digest = ids_digest(content)
    return reference.replaced(ids_digest=digest)


def _ids_of(table: FileTable, files: Iterable[LiveFile]) -> pa.Table:
    parts = []
    for file in files:
        for batch in read_rows(table, file, ["id", "subject"]):
            keys = id_keys(batch.column("id"))
            shard = pa.repeat(pa.scalar(file.shard), batch.num_rows)
            parts.append(
                pa.table({"key": keys, "id": batch.column("id"), "subject": batch.column("subject"), "shard": shard})
            )
    return pa.concat_tables(parts) if parts else pa.table({"key": pa.array([], pa.int64())})


def _batches(table: FileTable, files: Iterable[LiveFile]) -> Iterator[Batch]:
    """Yield keys and vectors in the order of the files, small files joined: each search or addition costs by itself."""
    keys: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    rows = 0
    for file in files:
        for batch in read_rows(table, file, ["id", "front"]):
            if batch.num_rows:
                keys.append(id_keys(batch.column("id")))
                vectors.append(matrix_of(batch.column("front"), file.path))
                rows += batch.num_rows
            if rows >= JOINED_ROWS:
                yield _joined(keys), _joined(vectors)
                keys, vectors, rows = [], [], 0
    if keys:
        yield _joined(keys), _joined(vectors)


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the same batches, read by a thread while the last ones are worked on."""
    with ThreadPoolExecutor(1) as reader:
        waiting: deque[Future[Batch | None]] = deque()
        try:
            while True:
                while len(waiting) <= BATCHES_AHEAD:
                    waiting.append(reader.submit(next, batches, None))
                batch = waiting.popleft().result()
                if batch is None:
                    return
                yield batch
        finally:
            reader.shutdown(wait=True, cancel_futures=True)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _dim(table: FileTable, files: Iterable[LiveFile]) -> int:
    for _, vectors in _batches(table, files):
        return int(vectors.shape[1])
    raise StoreError(f"{table.place.uri}: holds no vector.")
