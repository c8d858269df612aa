"""Verify: read the whole store and compare every byte that matters with what its releases say.

Nothing is changed. Each problem names the thing, what is wrong, and how to fix it. Leftovers of interrupted runs are
listed; they are no problem.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterable
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from schemas.errors import BadModelError, FrontalisError, StoreError, first_line
from schemas.metrics import RAW
from schemas.releases import IndexRef, Release, anchor_of
from storage.checksums import check_whole
from storage.delta_log import DamagedFilesError
from storage.features import feature_keys, features_table, quarantine_table
from storage.ids import id_keys
from storage.layout import FORGET_LOG, TOMBSTONES, report_folder
from storage.leftovers import find_leftovers
from storage.location import Location, digest_file
from storage.manifest import Manifest
from storage.releases import Releases
from storage.tables import NO_TABLE, FileTable, LiveFile, Snapshot
from storage.tombstones import Tombstones, TombstonesLostError
from storage.vectors.store import open_ids, open_index

log = logging.getLogger("frontalis.verify")

RECOMPUTE = "delete it, then run `frontalis reprocess` with this source and these models"
RESTORE_LOG = "restore the table's _delta_log from a backup"
LOST_VERSION = (
    "run `frontalis reprocess` with this source and these models: it publishes the version again, or marks the release"
)
RESTORE_LIST = (
    "restore the newest copy of it from a backup: one that has every entry which releases and log prove is accepted; "
    "without a backup run `frontalis forget --new-list --from FILE` with everybody who was ever forgotten"
)
FORGET_AGAIN = "run `frontalis forget` once more for the person last forgotten; it applies every tombstone"


class Problem(BaseModel):
    """Something wrong: the thing, what is wrong with it, and the way out."""

    thing: str
    what: str
    remedy: str


class LeftoverFile(BaseModel):
    """A file that nothing needs, relative to the store."""

    name: str
    size: int
    temporary: bool


class Checked(BaseModel):
    """What was checked, and what was found."""

    store: str
    releases: list[str]
    files: int
    bytes: int
    rows: int
    problems: list[Problem]
    leftovers: list[LeftoverFile]


def check(store: str) -> Checked:
    """Check every file that the releases with files and the newest table versions name.

    Raises:
        SettingsError: there is no such store.
        StoreError: the release history itself cannot be read.
    """
    return _Check(Releases.of(Location(store))).run()


class _Check:
    """One pass over a store. Files that several releases share are read once."""

    def __init__(self, history: Releases) -> None:
        self.history, self.store = history, history.store
        store = history.store
        self.problems: list[Problem] = []
        self.features, self.quarantine = features_table(store), quarantine_table(store)
        self.tombstones = Tombstones(store, load=False)
        self.keys: dict[str, np.ndarray] = {}
        self.seen: set[str] = set()
        self.bytes = self.rows = 0

    def run(self) -> Checked:
        releases = self.history.all()
        kept = [release for release in releases if not (release.erased or release.vacuumed)]
        self._one_served(releases)
        self._list_of_tombstones(releases)
        features, quarantine = self._newest(self.features), self._newest(self.quarantine)
        for release in kept:
            log.info("verify: %s", release.release)
            self._release(release)
        anchor = anchor_of(releases)
        if anchor is not None:
            for model in anchor.models.values():
                self._model(f"{anchor.release}, the anchor", model.path, model.file_digest)
        self._files(self.features, features.files.values())
        self._files(self.quarantine, quarantine.files.values())
        self._sums(features, quarantine)
        return Checked(
            store=self.store.uri,
            releases=[release.release for release in kept],
            files=len(self.seen),
            bytes=self.bytes,
            rows=self.rows,
            problems=self.problems,
            leftovers=self._leftovers(kept, anchor),
        )

    def _one_served(self, releases: list[Release]) -> None:
        served = [release.release for release in releases if release.serving]
        promoted = [old for old in releases if old.gate.promoted and not (old.erased or old.vacuumed)]
        if len(served) != 1 and promoted:
            self._wrong(
                "releases",
                f"{len(served)} releases are served",
                f"run `frontalis rollback --store {self.store.uri} {promoted[-1].release}`",
            )

    def _list_of_tombstones(self, releases: list[Release]) -> None:
        try:
            self.tombstones = Tombstones.proven(self.store, releases)
        except TombstonesLostError as error:
            self._wrong(TOMBSTONES, error.what, RESTORE_LIST)
        except StoreError as error:
            self._wrong(FORGET_LOG, str(error), "restore it from a backup, or correct the line")
        else:
            return
        with contextlib.suppress(TombstonesLostError):  # what is left of it still finds rows
            self.tombstones = Tombstones(self.store)

    def _newest(self, table: FileTable) -> Snapshot:
        try:
            snapshot = table.snapshot()
        except DamagedFilesError as error:
            for place in error.places:
                self._wrong(self._name(place), f"is damaged ({error.why})", error.remedy)
            return NO_TABLE
        except StoreError as error:
            self._wrong(table.place.name, str(error), RESTORE_LOG)
            return NO_TABLE
        for place, why in table.log.damaged_commits():
            self._wrong(self._name(place), f"is damaged ({why})", RESTORE_LOG)
        return snapshot

    def _sums(self, features: Snapshot, quarantine: Snapshot) -> None:
        """Add up the rows of every shard of which the manifest knows how many were read for these files."""
        records = Manifest(self.store).load().records
        for key, file in feature_keys(features).items():
            record = records.get(key.shard)
            if key.mode != RAW or record is None or record.input_digest != key.input:
                continue
            bad = quarantine.files.get(key.quarantine_path)
            lost = record.unaccounted(file.rows, bad.rows if bad is not None else 0)
            if lost is not None:
                self._wrong(f"shard {key.shard}", lost, "run `frontalis reprocess` with this source and these models")

    def _release(self, release: Release) -> None:
        name = release.release
        try:
            features = self.features.snapshot(release.features_version)
            quarantine = (
                NO_TABLE if release.quarantine_version is None else self.quarantine.snapshot(release.quarantine_version)
            )
        except StoreError as error:
            self._wrong(name, str(error), LOST_VERSION)
            return
        self._files(self.features, features.files.values())
        self._files(self.quarantine, quarantine.files.values())
        for mode, index in release.indexes.items():
            files = features.of_mode(mode)
            rows = sum(file.rows for file in files)
            if rows != release.data.rows_features:
                self._wrong(
                    f"{name}, mode {mode}",
                    f"the features hold {rows} rows, the release says {release.data.rows_features}",
                    "run `frontalis reprocess`",
                )
            self._index(f"{name}, mode {mode}", index, files, release.serving)
        quarantined = sum(file.rows for file in quarantine.files.values())
        if quarantined != sum(release.data.quarantined.values()):
            self._wrong(
                name,
                f"quarantine holds {quarantined} rows, the release says {sum(release.data.quarantined.values())}",
                "run `frontalis reprocess`",
            )
        for mode, model in release.models.items():
            self._model(f"{name}, model {mode}", model.path, model.file_digest)
        if release.report is None or (self.store / release.report).size() is None:
            remedy = f"restore {report_folder(name)} from a backup; its metrics are in the releases table"
            self._wrong(name, "its report is missing", remedy)

    def _files(self, table: FileTable, files: Iterable[LiveFile]) -> None:
        for file in sorted(files, key=lambda file: file.path):
            name = f"{table.place.name}/{file.path}"
            if name in self.seen:
                continue
            self.seen.add(name)
            try:
                self._file(table, file, name)
            except FileNotFoundError:
                self._wrong(name, "is missing", "run `frontalis reprocess` with this source and these models")
            except (pa.ArrowException, OSError, ValueError, KeyError, FrontalisError) as error:
                self._wrong(name, f"cannot be read ({first_line(error, 120)})", RECOMPUTE)

    def _file(self, table: FileTable, file: LiveFile, name: str) -> None:
        """Read all of one file: it carries its digest, so a flipped bit shows."""
        place = table.place / file.path
        size = place.size()
        if size is None:
            raise FileNotFoundError(name)
        self.bytes += size
        if size != file.size:
            self._wrong(name, f"has {size} bytes, the table says {file.size}", RECOMPUTE)
            return
        with place.open_input() as stream:
            check_whole(stream)
        keys, rows, forgotten = [], 0, 0
        with place.open_input() as stream:
            parquet = pq.ParquetFile(stream, pre_buffer=False, page_checksum_verification=True)
            for batch in parquet.iter_batches(use_threads=False):
                rows += batch.num_rows
                ids = batch.column("id")
                if self.tombstones:
                    forgotten += int(self.tombstones.match(ids, batch.column("subject"))[0].sum())
                if table is self.features:
                    keys.append(id_keys(ids))
        if rows != file.rows:
            self._wrong(name, f"has {rows} rows, the table says {file.rows}", RECOMPUTE)
        if forgotten:
            self._wrong(name, f"holds {forgotten} rows of somebody who was forgotten", FORGET_AGAIN)
        self.rows += rows
        self.keys[file.path] = np.concatenate(keys) if keys else np.zeros(0, np.int64)

    def _index(self, name: str, index: IndexRef, files: list[LiveFile], served: bool) -> None:
        rebuild = (
            f"delete the folder {PurePosixPath(index.path).parent}, then run `frontalis reprocess`, or roll back"
            if served
            else f"it is not served: `frontalis vacuum --store {self.store.uri} --keep 1` drops old releases"
        )
        try:
            searched = open_index(self.store, index)
            ids = open_ids(self.store, index)
        except StoreError as error:
            self._wrong(name, str(error), rebuild)
            return
        for path in (index.path, index.ids_path):
            self.seen.add(path)
            self.bytes += (self.store / path).size() or 0
        if len(searched) != ids.num_rows or ids.num_rows != index.rows:
            self._wrong(name, f"{len(searched)} vectors, {ids.num_rows} ids, {index.rows} rows in the record", rebuild)
        if any(file.path not in self.keys for file in files):
            return  # reported already
        stored = [self.keys[file.path] for file in files]
        if not np.array_equal(np.sort(np.concatenate(stored)), ids["key"].to_numpy()):
            self._wrong(name, "the ids of the index are not those of the features", rebuild)
        if self.tombstones and not name.endswith(RAW):
            return  # the ids of a release are the same in every mode
        gone = self.tombstones.match(ids["id"].combine_chunks(), ids["subject"].combine_chunks())[0].sum()
        if gone:
            self._wrong(name, f"the index holds {gone} rows of somebody who was forgotten", FORGET_AGAIN)

    def _model(self, name: str, path: str, digest: str) -> None:
        place = self.store / path
        if path in self.seen:
            return
        self.seen.add(path)
        try:
            found = digest_file(place, hashlib.sha256)
        except FileNotFoundError:
            self._wrong(name, f"{path} is missing", f"copy the model to {place.uri}, or run `frontalis reprocess`")
            return
        except (OSError, BadModelError, StoreError) as error:
            self._wrong(name, f"{path} cannot be read ({error})", RECOMPUTE)
            return
        self.bytes += place.size() or 0
        if found != digest:
            self._wrong(name, f"{path} has digest {found[:12]}, the release says {digest[:12]}", RECOMPUTE)

    def _leftovers(self, kept: list[Release], anchor: Release | None) -> list[LeftoverFile]:
        try:
            found = find_leftovers(self.store, kept, anchor)
        except StoreError:
            return []  # a release cannot be read; that is reported
        return [LeftoverFile(name=one.name, size=one.size, temporary=one.temporary) for one in found]

    def _name(self, place: Location) -> str:
        return place.uri.removeprefix(f"{self.store.uri}/")

    def _wrong(self, thing: str, what: str, remedy: str) -> None:
        self.problems.append(Problem(thing=thing, what=what, remedy=remedy))
