"""The releases of a store: the history of what was published, and which one is served.

The table is one small file that every change replaces in one Delta commit, so a reader sees the old list or the new
one, and of two writers one is refused. A file's name begins with the first version that may list it. Deciding on
promotion is `tasks.gate`.
"""

from collections.abc import Iterable, Sequence

import pyarrow as pa
from pydantic import ValidationError

from schemas.errors import SettingsError, StoreBusyError, StoreError, first_line
from schemas.features import digest_of
from schemas.releases import RELEASES_SCHEMA, Release, anchor_of
from storage.delta_log import DamagedFilesError
from storage.features import features_table, quarantine_table
from storage.layout import LOCK, RELEASES, history_name
from storage.location import Location
from storage.parquet import from_parquet, to_parquet
from storage.tables import FileTable, ForeignTableError, LiveFile, Snapshot


class Releases:
    """The release history of a store, oldest first."""

    def __init__(self, store: Location) -> None:
        self.store = store
        self.table = FileTable(store / RELEASES, (), ("record",))

    @classmethod
    def of(cls, store: Location) -> "Releases":
        """Return the history of an existing store; every command that does not create one begins here.

        Raises:
            SettingsError: at `store` there is no release history, no table and no lock file of a first run
                that was killed before its release, so it may not be a store.
        """
        history = cls(store)
        tables = (history.table, features_table(store), quarantine_table(store))
        if not any(_is_ours(table) for table in tables) and not (store / LOCK).exists():
            what = "holds no releases, so it is no store" if store.exists() else "does not exist"
            raise SettingsError(f"store {store.uri}: {what}; check the path, or make it with `frontalis reprocess`.")
        return history

    def made(self) -> list[Release]:
        """Return every release, as `all`, of a store that has one.

        Raises:
            SettingsError: a first run was killed or refused before it made one.
        """
        found = self.all()
        if not found:
            raise SettingsError(f"store {self.store.uri}: no run has made a release yet; run `frontalis reprocess`.")
        return found

    def all(self) -> list[Release]:
        """Return every release ever recorded, oldest first; empty for a store without any.

        Raises:
            StoreError: the table is damaged.
        """
        return self._newest()[1]

    def serving(self) -> Release:
        """Return the release that answers queries.

        Raises:
            StoreError: nothing was promoted yet.
        """
        for release in self.all():
            if release.serving:
                return release
        raise StoreError(f"{self.store.uri}: no release is served yet; run `frontalis reprocess` first.")

    def named(self, name: str) -> Release:
        """Return a release by name, served or not. Raises SettingsError where there is none."""
        return self._named(name, self.all())

    def _named(self, name: str, releases: list[Release]) -> Release:
        for release in releases:
            if release.release == name:
                return release
        known = ", ".join(release.release for release in releases[-5:]) or "none yet"
        raise SettingsError(f"release {name!r} is not in {self.store.uri}; the latest are: {known}.")

    def record(self, release: Release, planned_on: Sequence[Release]) -> None:
        """Add a release; where it was promoted, it is served from this commit on.

        The first that is served is the anchor (`schemas.releases.anchor_of`), until `anchor` moves it.

        Args:
            release: the new one.
            planned_on: the history as it was when the run began.

        Raises:
            StoreBusyError: the history has changed since; nothing changed.
        """
        releases = [old for old in planned_on if old.release != release.release]
        if release.gate.promoted:
            releases = [old.as_retired() for old in releases]
        release = release.as_served() if release.gate.promoted else release.as_retired()
        anchor = anchor_of(planned_on) or (release if release.serving else None)
        after = [*releases, release]
        if anchor is not None:
            after = [old.as_anchor(old.release == anchor.release) for old in after]
        self.rewrite(after, planned_on)

    def serve(self, name: str) -> Release:
        """Serve an older (or newer) release from now on, and return it.

        The checks read the same version of the history that is replaced, so no lock is needed.

        Raises:
            SettingsError: see `servable`.
            StoreBusyError: another change came between; nothing changed.
        """
        base, releases = self._newest()
        self._servable(name, releases)
        releases = [old.as_served() if old.release == name else old.as_retired() for old in releases]
        self._write(base, releases)
        return self._named(name, releases)

    def anchor(self, name: str) -> Release:
        """Make a release the anchor from now on, and return it. It may have been vacuumed: its models are needed.

        Raises:
            SettingsError: there is none of that name, or it was never promoted and is not served.
            StoreBusyError: another change came between; nothing changed.
        """
        base, releases = self._newest()
        wanted = self._named(name, releases)
        if not (wanted.gate.promoted or wanted.serving):
            raise SettingsError(f"release {name} was rejected; the anchor is a release that was served.")
        releases = [old.as_anchor(old.release == name) for old in releases]
        self._write(base, releases)
        return self._named(name, releases)

    def servable(self, name: str) -> Release:
        """Return a release that may be served.

        Raises:
            SettingsError: there is none of that name, its files were removed, or a person was forgotten since.
        """
        return self._servable(name, self.all())

    def _servable(self, name: str, releases: list[Release]) -> Release:
        wanted = self._named(name, releases)
        if wanted.erased:
            raise SettingsError(f"release {name} holds a person who was forgotten since; choose a later one.")
        if wanted.vacuumed:
            raise SettingsError(f"release {name}: its files were removed by `frontalis vacuum`; choose a later one.")
        return wanted

    def rewrite(self, releases: Iterable[Release], planned_on: Sequence[Release]) -> None:
        """Replace the whole history in one commit.

        Args:
            releases: the new history.
            planned_on: the history that it was made from.

        Raises:
            StoreBusyError: the history is not `planned_on` any more; nothing changed.
        """
        base, now = self._newest()
        if now != list(planned_on):
            raise StoreBusyError(
                f"{self.store.uri}: another run changed the releases meanwhile; nothing was published. Run again: it "
                "reuses what is computed."
            )
        self._write(base, list(releases))

    def _newest(self) -> tuple[Snapshot, list[Release]]:
        """Return the newest version and its releases. A vacuum may delete the file of a replaced version."""
        snapshot = self.table.snapshot()
        while True:
            try:
                return snapshot, self._read(snapshot)
            except StoreError as error:
                listed, snapshot = snapshot, self.table.snapshot()
                if not isinstance(error.__cause__, FileNotFoundError) or snapshot.version == listed.version:
                    raise

    def _read(self, snapshot: Snapshot) -> list[Release]:
        releases: list[Release] = []
        for file in snapshot.files.values():
            place = self.table.place / file.path
            try:
                rows = from_parquet(place.read_bytes())
                releases += [Release.model_validate_json(record) for record in rows["record"].to_pylist()]
            except (FileNotFoundError, pa.ArrowException, OSError, ValidationError, KeyError) as error:
                raise StoreError(
                    f"{place.uri}: the release history cannot be read ({first_line(error)}); restore the "
                    "releases folder from a backup."
                ) from error
        return sorted(releases, key=lambda release: release.number)

    def _write(self, base: Snapshot, releases: list[Release]) -> None:
        rows = [
            {
                "release": release.release,
                "number": release.number,
                "created": release.created,
                "serving": release.serving,
                "promoted": release.gate.promoted,
                "reason": release.gate.reason,
                "features_version": release.features_version,
                "record": release.model_dump_json(),
            }
            for release in releases
        ]
        content = to_parquet(pa.Table.from_pylist(rows, schema=RELEASES_SCHEMA))
        name = history_name(base.version + 1, digest_of(content, str(base.version).encode()))
        try:
            (self.table.place / name).write_bytes(content)
        except FileNotFoundError as error:  # a vacuum took the temporary file of a rollback, which has no lock
            raise StoreBusyError(f"{self.store.uri}: a vacuum is running; nothing was changed. Run again.") from error
        file = LiveFile(name, len(content), len(rows), {})
        self.table.commit(base, RELEASES_SCHEMA, [file], base.files.values())


def refuse_foreign_tables(store: Location) -> None:
    """Refuse a folder with tables of another program, before anything is written into it.

    Raises:
        ForeignTableError: a Delta table at the place of one of the store's is none of Frontalis.
    """
    for table in (features_table(store), quarantine_table(store), Releases(store).table):
        table.refuse_foreign()


def _is_ours(table: FileTable) -> bool:
    """Return whether the table exists, readable or not; one of another program does not count."""
    try:
        return table.snapshot().exists
    except ForeignTableError:
        return False
    except DamagedFilesError:
        return True
