"""Changes: which rows, shards, subjects and modes of the served release a new one adds, changes and removes.

Feature files of equal content are equal rows and are not opened. Of the others only ids and subjects are read, so the
cost is in proportion to what changed. Whether that much may be removed is decided by `tasks.removal`.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import StoreError
from schemas.metrics import RAW
from schemas.releases import Release
from schemas.reports import Changes
from storage.features import feature_keys, features_table, read_rows
from storage.ids import id_keys
from storage.location import Location
from storage.tables import FileTable, LiveFile, Snapshot
from storage.tombstones import Tombstones

log = logging.getLogger("frontalis.changes")

Content = tuple[str, str]
"""Input and model digest of a raw feature file: files of equal content hold equal rows."""


def changes_since(
    served: Release, before: Snapshot | None, after: Snapshot, modes: Iterable[str], store: Location
) -> Changes:
    """Compare the features of a new release with those of the served one.

    Rows are compared by id, so a row that moves to another shard is not removed. Rows of somebody who was forgotten
    count as neither removed nor changed. If the old files cannot be read, rows are counted by shard instead.

    Args:
        served: the release that is served.
        before: its feature files; None where its table version is lost.
        after: the feature files of the new release.
        modes: those of the new release.
        store: the store.
    """
    dropped = [mode for mode in served.models if mode not in modes]
    new = _raw_files(after)
    if before is None:
        return _by_totals(served, new, dropped)
    old = _raw_files(before)
    try:
        return _by_id(store, served, old, new, dropped)
    except StoreError as error:
        log.warning("rows of %s are counted by shard, not by id: %s", served.release, error)
        return _by_shard(served, old, new, dropped)


def _raw_files(snapshot: Snapshot) -> dict[Content, LiveFile]:
    keys = feature_keys(snapshot).items()
    return {(key.input, key.model): file for key, file in keys if key.mode == RAW and file.rows}


def _by_id(
    store: Location,
    served: Release,
    old: Mapping[Content, LiveFile],
    new: Mapping[Content, LiveFile],
    dropped: Sequence[str],
) -> Changes:
    table, tombstones = features_table(store), Tombstones(store)
    gone = [_read(table, file, tombstones) for content, file in old.items() if content not in new]
    came = [_read(table, file, None) for content, file in new.items() if content not in old]
    keys = _joined([one.keys for one in gone])
    left = np.isin(keys, _joined([one.keys for one in came]))
    by_shard = np.split(left, np.cumsum([len(one.keys) for one in gone])[:-1]) if gone else []
    shared = [file for content, file in old.items() if content in new]
    subjects, subjects_before = _removed_subjects(table, gone, came, shared)
    return Changes(
        since=served.release,
        rows_before=sum(file.rows for file in old.values()),
        rows_added=sum(len(one.keys) for one in came) - int(left.sum()),
        rows_changed=int(left.sum()),
        rows_removed=int((~left).sum()),
        shards_before=len(old),
        shards_removed=sum(1 for one in by_shard if len(one) and not one.any()),
        subjects_before=subjects_before,
        subjects_removed=subjects,
        modes_removed=list(dropped),
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of one file: the keys of their ids, int64 `[n]`, and the subjects among them."""

    keys: np.ndarray
    subjects: set[str]


def _read(table: FileTable, file: LiveFile, tombstones: Tombstones | None) -> _Rows:
    """Read one file, without the rows that a tombstone matches."""
    keys, subjects = [], set[str]()
    for batch in read_rows(table, file, ["id", "subject"]):
        if tombstones:
            forgotten, _ = tombstones.match(batch.column("id"), batch.column("subject"))
            batch = batch.filter(pa.array(~forgotten))
        keys.append(id_keys(batch.column("id")))
        subjects |= _names(batch.column("subject"))
    return _Rows(_joined(keys), subjects)


def _removed_subjects(
    table: FileTable, gone: Iterable[_Rows], came: Iterable[_Rows], shared: Iterable[LiveFile]
) -> tuple[int, int | None]:
    """Return how many subjects have no row any more, of how many; files that both have are read only if needed."""
    before = set[str]().union(*(one.subjects for one in gone))
    missing = before.difference(*(one.subjects for one in came))
    if not missing:
        return 0, None
    kept = set[str]()
    for file in shared:
        for batch in read_rows(table, file, ["subject"]):
            kept |= _names(batch.column("subject"))
    return len(missing - kept), len(before | kept)


def _by_shard(
    served: Release, old: Mapping[Content, LiveFile], new: Mapping[Content, LiveFile], dropped: Sequence[str]
) -> Changes:
    """Compare numbers of rows by shard: what the names of the files alone say."""
    before = {file.shard: file.rows for content, file in old.items() if content not in new}
    after = {file.shard: file.rows for content, file in new.items() if content not in old}
    return Changes(
        since=served.release,
        rows_before=sum(file.rows for file in old.values()),
        rows_added=sum(max(0, rows - before.get(shard, 0)) for shard, rows in after.items()),
        rows_changed=sum(min(rows, after.get(shard, 0)) for shard, rows in before.items()),
        rows_removed=sum(max(0, rows - after.get(shard, 0)) for shard, rows in before.items()),
        shards_before=len(old),
        shards_removed=len(before.keys() - after.keys()),
        modes_removed=list(dropped),
    )


def _by_totals(served: Release, new: Mapping[Content, LiveFile], dropped: Sequence[str]) -> Changes:
    """Compare with the counts in the record of the served release, the only ones that are left."""
    before, rows = served.data, sum(file.rows for file in new.values())
    return Changes(
        since=served.release,
        rows_before=before.rows_features,
        rows_added=max(0, rows - before.rows_features),
        rows_changed=min(rows, before.rows_features),
        rows_removed=max(0, before.rows_features - rows),
        shards_before=before.shards,
        shards_removed=max(0, before.shards - len(new)),
        modes_removed=list(dropped),
    )


def _names(subjects: pa.Array) -> set[str]:
    return set(pc.unique(subjects.drop_null()).to_pylist())


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
