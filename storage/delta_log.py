"""The log of a Delta table (`_delta_log`): commits that survive a power cut, damaged files, a bounded number of files.

delta-rs gives a commit its name without waiting for the disk, so after a power cut the newest one may be missing, empty
or cut off. `sync` waits for the disk. `check` and `find_damage` name a damaged file; only `flows.reprocess` deletes
it. `trim` replaces old commits with one checkpoint. What is in a table is left to `storage.tables`.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from schemas.errors import StoreError
from storage.location import Location

LOG = "_delta_log"
HINT = "_last_checkpoint"
TAIL = 64 << 10
TRIMMED_AT_ONCE = 10  # old commits that are worth a new checkpoint

_ENTRY = re.compile(r"(?P<version>\d{20})\.(?P<kind>json|checkpoint\.parquet)")


class DamagedFilesError(StoreError):
    """The bytes of some files are not those that were written; `flows.reprocess` deletes the files and goes on."""

    def __init__(
        self, places: Sequence[Location], why: str, remedy: str = "run `frontalis reprocess` to compute it again"
    ) -> None:
        self.places, self.why, self.remedy = list(places), why, remedy
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        super().__init__(f"{places[0].uri}{more}: is damaged ({why}); {remedy}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.places, self.why, self.remedy)


class DeltaLog:
    """The log of the table at `table`."""

    def __init__(self, table: Location) -> None:
        self.table = table
        self.place = table / LOG

    def sync(self, first: int, last: int) -> None:
        """Put the commits `first` to `last`, the checkpoints made with them and their names on the disk."""
        for version in range(first, last + 1):
            (self.place / _name(version, "json")).sync()
            (self.place / _name(version, "checkpoint.parquet")).sync()
        (self.place / HINT).sync()
        self.place.sync()
        self.table.sync()

    def check(self, version: int) -> None:
        """Look at the end of a local commit, which delta-rs accepts when it is empty. On S3 a file is always whole.

        Raises:
            DamagedFilesError: it is damaged and the newest one.
            StoreError: it is damaged and an older one.
        """
        if not self.table.is_local:
            return
        place = self.place / _name(version, "json")
        why = _damage(place)
        if why is None:
            return
        if version < max(self._versions("json"), default=-1):
            raise StoreError(f"{place.uri}: is damaged ({why}); restore it from a backup of {self.table.name}.")
        raise _remedied([place], why)

    def find_damage(self) -> DamagedFilesError | None:
        """Return what makes the table unreadable, where deleting files that nothing needs makes it readable."""
        commits, checkpoints = self._versions("json"), self._versions("checkpoint.parquet")
        for version in sorted(checkpoints)[-1:]:
            place = self.place / _name(version, "checkpoint.parquet")
            why = _checkpoint_damage(place)
            below = max((other for other in checkpoints if other < version), default=-1)
            if why is not None and set(range(below + 1, version + 1)) <= commits:
                return _remedied([self.place / HINT, place], why)
        for version in sorted(commits)[-1:]:
            place = self.place / _name(version, "json")
            why = _damage(place, whole=True)
            if why is not None:
                return _remedied([place], why)
        return None

    def damaged_commits(self) -> list[tuple[Location, str]]:
        """Return every damaged commit of the log, oldest first, and what is wrong with it; all of them are read."""
        places = [self.place / _name(version, "json") for version in sorted(self._versions("json"))]
        return [(place, why) for place in places if (why := _damage(place, whole=True)) is not None]

    def trim(self, oldest: int, options: dict[str, str]) -> list[str]:
        """Delete commits and checkpoints that no version from `oldest` on needs, and return their names.

        Those versions stay readable: a checkpoint at `oldest` takes the place of what is deleted.
        """
        checkpoints = {version for version in self._versions("checkpoint.parquet") if version <= oldest}
        old = {version for version in self._versions("json") if version < oldest}
        if len(old) < TRIMMED_AT_ONCE:
            return []
        if oldest not in checkpoints:
            self._checkpoint(oldest, options)
        names = [_name(version, "json") for version in sorted(old)]
        names += [_name(version, "checkpoint.parquet") for version in sorted(checkpoints - {oldest})]
        for name in names:
            (self.place / name).delete()
        return names

    def _checkpoint(self, version: int, options: dict[str, str]) -> None:
        hint = self.place / HINT
        try:
            table = DeltaTable(self.table.uri, version=version, storage_options=options)
            before = sorted(table.file_uris())
            newest = hint.read_bytes() if hint.exists() else None
            table.create_checkpoint()
            if newest is not None and json.loads(newest)["version"] > version:
                hint.write_bytes(newest)
            self.sync(version, version)
            after = DeltaTable(self.table.uri, version=version, storage_options=options)
            if sorted(after.file_uris()) != before:
                raise StoreError(f"{self.table.uri}: the checkpoint of version {version} is not that version.")
        except (DeltaError, OSError, ValueError, KeyError) as error:
            raise StoreError(f"{self.table.uri}: no checkpoint of version {version} can be made ({error}).") from error

    def _versions(self, kind: str) -> set[int]:
        entries = (_ENTRY.fullmatch(entry.name) for entry in self.place.files(hidden=True, links=False))
        return {int(entry["version"]) for entry in entries if entry and entry["kind"] == kind}


def _name(version: int, kind: str) -> str:
    return f"{version:020d}.{kind}"


def _remedied(places: Sequence[Location], why: str) -> DamagedFilesError:
    return DamagedFilesError(places, why, "run `frontalis reprocess`, which deletes it and publishes again")


def _damage(place: Location, *, whole: bool = False) -> str | None:
    """Return what is wrong with a commit, by its last line or by all of it; None where nothing is, or it is absent."""
    try:
        with place.open_input() as file:
            size = file.size()
            start = 0 if whole else max(0, size - TAIL)
            file.seek(start)
            lines = bytes(file.read()).strip(b"\n").split(b"\n")
    except FileNotFoundError:
        return None
    if size == 0:
        return "it is empty, as a power cut may leave it"
    if start and len(lines) == 1:
        return None  # one line longer than TAIL; delta-rs reads all of it
    try:
        actions = [json.loads(line) for line in (lines if start == 0 else lines[-1:])]
    except ValueError:
        actions = [None]
    if not all(isinstance(action, dict) for action in actions):
        return "it is cut off or no JSON, as a power cut may leave it"
    return None


def _checkpoint_damage(place: Location) -> str | None:
    try:
        with place.open_input() as file:
            pq.read_metadata(file)
    except (pa.ArrowException, OSError, ValueError):
        return "it is empty or no Parquet, as a power cut may leave it"
    return None
