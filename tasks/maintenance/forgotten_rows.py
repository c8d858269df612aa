"""Find the rows that tombstones match, in the features, the quarantine and the releases of a store.

Nothing is changed: erasing the rows is left to `tasks.maintenance.erase`.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import pyarrow as pa

from schemas.errors import StoreError
from schemas.metrics import RAW
from schemas.releases import Release
from storage.features import features_table, quarantine_table, read_table
from storage.location import Location
from storage.tables import NO_TABLE, FileTable, LiveFile, Snapshot
from storage.tombstones import Found, Tombstones
from storage.vectors.store import open_ids


@dataclass
class Hits:
    """Forgotten rows of one shard: ids of those with features, row numbers of those in quarantine, the tombstones."""

    ids: pa.Array
    quarantined: list[int] = field(default_factory=list)
    marks: set[str] = field(default_factory=set)

    @property
    def rows(self) -> int:
        """How many rows leave."""
        return len(self.ids) + len(self.quarantined)


def find_forgotten(
    store: Location, features: Snapshot, quarantine: Snapshot, tombstones: Tombstones
) -> dict[str, Hits]:
    """Return, by shard, the rows of two snapshots that a tombstone matches.

    Raises:
        StoreError: a file is damaged.
    """
    found: dict[str, Hits] = {}
    table = features_table(store)
    for file in features.of_mode(RAW):
        rows = read_table(table, [file], ["id", "subject"])
        ids = rows["id"].combine_chunks()
        gone, marks = tombstones.match(ids, rows["subject"].combine_chunks())
        if gone.any():
            found[file.shard] = Hits(ids.filter(pa.array(gone)), marks=set(marks))
    table = quarantine_table(store)
    for file in quarantine.files.values():
        rows = read_table(table, [file], ["row", "id", "subject"])
        gone, marks = tombstones.match(rows["id"].combine_chunks(), rows["subject"].combine_chunks())
        if gone.any():
            hits = found.setdefault(file.shard, Hits(pa.array([], pa.string())))
            hits.quarantined = rows["row"].filter(pa.array(gone)).to_pylist()
            hits.marks.update(marks)
    return found


def why_not_kept(store: Location, shard: str, files: Iterable[str], tombstones: Tombstones) -> str | None:
    """Return why the last good features of a bad shard must not be kept, or None where they may.

    They may be older than the last tombstones: where forgetting was interrupted, and the shard went bad before it was
    completed. A release says that all its rows were matched with the newest list, so these are matched again.

    Args:
        store: the store.
        shard: a key.
        files: paths in the features table that would be kept.
        tombstones: all of them.
    """
    if not tombstones:
        return None
    features, quarantine = features_table(store), quarantine_table(store)
    kept, bad = features.snapshot(), quarantine.snapshot()
    names = {path for path in files if path in kept.files}
    kept = replace(kept, files={path: kept.files[path] for path in names})
    bad = replace(bad, files={file.path: file for file in bad.of_shard(shard)})
    try:
        if not find_forgotten(store, kept, bad, tombstones):
            return None
    except StoreError as error:
        return f"Its last good features cannot be matched with the tombstones ({error})."
    return (
        "Its last good features hold rows of somebody who was forgotten, so they are left out; repair the shard, or "
        "run `frontalis forget` once more for that person before the next run."
    )


@dataclass
class Matches:
    """What tombstones match: `found` by mark, in all releases that can be served and in the newest tables.

    The counts are of the release that is served, or of the newest tables where nothing is served.
    """

    found: dict[str, Found] = field(default_factory=dict)
    rows: int = 0
    quarantined: int = 0
    shards: set[str] = field(default_factory=set)


def find_matches(store: Location, releases: Iterable[Release], tombstones: Tombstones) -> Matches:
    """Return what tombstones match anywhere in a store.

    Raises:
        StoreError: a file of the served release is damaged. Releases that are not served are skipped then.
    """
    usable = [release for release in releases if not release.unusable]
    served = next((release for release in usable if release.serving), None)
    features, quarantine = features_table(store), quarantine_table(store)
    live, live_quarantine = features.snapshot(), quarantine.snapshot()
    matches = Matches()
    shown = features.snapshot(served.features_version) if served else live
    shown_quarantine = _quarantine_of(quarantine, served) if served else live_quarantine
    for shard, ids, subjects in _rows(features, shown.of_mode(RAW)):
        matches.rows += _count(matches, tombstones, shard, ids, subjects)
    for shard, ids, subjects in _rows(quarantine, shown_quarantine.files.values()):
        matches.quarantined += _count(matches, tombstones, shard, ids, subjects)
    elsewhere: dict[str, Found] = {}
    for release in usable:
        with contextlib.suppress(StoreError):
            if release is not served and RAW in release.indexes:
                ids = open_ids(store, release.indexes[RAW])
                _merge(elsewhere, tombstones.find(ids["id"].combine_chunks(), ids["subject"].combine_chunks()))
            for _, ids, subjects in _rows(quarantine, _quarantine_of(quarantine, release).files.values()):
                _merge(elsewhere, tombstones.find(ids, subjects))
    with contextlib.suppress(StoreError):
        known = set(shown.files)
        fresh = [file for file in live.of_mode(RAW) if file.path not in known]
        for table, files in ((features, fresh), (quarantine, live_quarantine.files.values())):
            for _, ids, subjects in _rows(table, files):
                _merge(elsewhere, tombstones.find(ids, subjects))
    for mark, one in elsewhere.items():
        matches.found.setdefault(mark, Found()).values |= one.values
    return matches


def _rows(table: FileTable, files: Iterable[LiveFile]) -> Iterator[tuple[str, pa.Array, pa.Array]]:
    for file in files:
        rows = read_table(table, [file], ["id", "subject"])
        yield file.shard, rows["id"].combine_chunks(), rows["subject"].combine_chunks()


def _count(matches: Matches, tombstones: Tombstones, shard: str, ids: pa.Array, subjects: pa.Array) -> int:
    found = tombstones.find(ids, subjects)
    if not found:
        return 0
    _merge(matches.found, found)
    matches.shards.add(shard)
    return int(tombstones.match(ids, subjects)[0].sum())


def _merge(into: dict[str, Found], found: dict[str, Found]) -> None:
    for mark, one in found.items():
        known = into.setdefault(mark, Found())
        known.rows += one.rows
        known.values |= one.values


def _quarantine_of(table: FileTable, release: Release) -> Snapshot:
    return NO_TABLE if release.quarantine_version is None else table.snapshot(release.quarantine_version)
