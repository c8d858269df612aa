"""Delta tables of files that we write ourselves: live files, one atomic commit, consistent reads.

Used for features and quarantine alike. A commit takes the version it was planned on and fails when another run has
committed since (`StoreBusyError`), also where neither removes what the other wrote: every commit carries Delta's
application transaction `frontalis`, and two of them on one base conflict. Which files are wanted is left to
`tasks.plan`, what is in them to `storage.features`.
"""

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Field, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from schemas.errors import SettingsError, StoreBusyError, StoreError, first_line
from storage.delta_log import DamagedFilesError, DeltaLog
from storage.location import Location

APPLICATION = "frontalis"
# By default Delta drops log entries after 30 days, and with them the versions that releases reference.
KEEP_LOG = {"delta.enableExpiredLogCleanup": "false", "delta.logRetentionDuration": "interval 36500 days"}


@dataclass(frozen=True)
class LiveFile:
    """A file in a snapshot. `path` is relative to the table; `partitions` are its partition values."""

    path: str
    size: int
    rows: int
    partitions: Mapping[str, str]

    @property
    def mode(self) -> str:
        """The value of partition `mode`."""
        return self.partitions["mode"]

    @property
    def shard(self) -> str:
        """The value of partition `shard`."""
        return self.partitions["shard"]


@dataclass(frozen=True)
class Snapshot:
    """The files of a table at one version, by path; version −1 is a table that does not exist yet."""

    version: int
    files: dict[str, LiveFile]

    @property
    def exists(self) -> bool:
        """Whether there is a table."""
        return self.version >= 0

    def of_mode(self, mode: str) -> list[LiveFile]:
        """Return the files of a mode in the order of their paths."""
        return [file for _, file in sorted(self.files.items()) if file.mode == mode]

    def of_shard(self, shard: str) -> list[LiveFile]:
        """Return the files of a shard in the order of their paths."""
        return [file for _, file in sorted(self.files.items()) if file.shard == shard]


NO_TABLE = Snapshot(-1, {})


class ForeignTableError(SettingsError):
    """A Delta table of another program is where a store has one of its own."""


class FileTable:
    """A Delta table of files at a location, partitioned by `partition_by`; it has the columns `needs`, too."""

    def __init__(self, place: Location, partition_by: tuple[str, ...], needs: tuple[str, ...] = ()) -> None:
        self.place = place
        self.partition_by = partition_by
        self.needs = needs
        self.log = DeltaLog(place)

    def refuse_foreign(self) -> None:
        """Refuse a table of another program. One that cannot be read is left to `snapshot`.

        Raises:
            ForeignTableError: its partitions or columns are not those of this table.
        """
        with contextlib.suppress(StoreError):
            self._open()

    def snapshot(self, version: int | None = None) -> Snapshot:
        """Return the live files at a version, the newest by default.

        Raises:
            ForeignTableError: it is a table of another program.
            DamagedFilesError: the newest commit is damaged.
            StoreError: the version is gone (vacuumed), or the log is damaged.
        """
        table = self._open(version)
        if table is None:
            if version is not None and version >= 0:
                raise StoreError(f"{self.place.uri}: has no version {version}; it was vacuumed, or the table is gone.")
            return NO_TABLE
        self.log.check(table.version())
        actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
        files = {
            action["path"]: LiveFile(
                action["path"],
                action["size_bytes"],
                action["num_records"] or 0,
                {name: action[f"partition.{name}"] for name in self.partition_by},
            )
            for action in actions
        }
        return Snapshot(table.version(), files)

    def schema(self) -> pa.Schema | None:
        """Return the Arrow schema of the table, or None where there is no table."""
        table = self._open()
        return None if table is None else pa.schema(table.schema().to_arrow())

    def commit(
        self, base: Snapshot, schema: pa.Schema, add: Iterable[LiveFile], remove: Iterable[LiveFile]
    ) -> Snapshot:
        """Add and remove files in one transaction, planned on `base`. Where there is nothing to do, `base` is returned.

        Raises:
            StoreBusyError: another run committed since `base`; nothing of this commit is visible.
        """
        added, removed = list(add), list(remove)
        if not added and not removed and base.version >= 0:
            return base
        table = self._open() if base.version >= 0 else self._create(schema)
        assert table is not None
        planned_on = self._number(self._open(base.version)) if base.version >= 0 else 0
        if self._number(table) != planned_on:
            raise self._busy()
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            AddAction(file.path, file.size, dict(file.partitions), now, True, json.dumps({"numRecords": file.rows}))
            for file in added
        ]
        actions += [RemoveAction(file.path, True, now, file.size, dict(file.partitions)) for file in removed]
        known = pa.schema(table.schema().to_arrow())
        missing = [field for field in schema if field.name not in known.names]
        try:
            if missing:
                table.alter.add_columns([_delta_field(field) for field in missing])
                table = self._open()
                assert table is not None
            table.create_write_transaction(
                actions,
                mode="append",
                schema=table.schema(),
                partition_by=list(self.partition_by),
                commit_properties=CommitProperties(
                    app_transactions=[Transaction(APPLICATION, self._number(table) + 1)], max_commit_retries=0
                ),
            )
        except CommitFailedError as error:
            raise self._busy() from error
        except (DeltaError, OSError) as error:
            raise StoreError(
                f"{self.place.uri}: the commit failed ({first_line(error)}). Nothing was published; rerun."
            ) from error
        after = self.snapshot()
        self.log.sync(base.version + 1, after.version)
        return after

    def _create(self, schema: pa.Schema) -> DeltaTable:
        try:
            return DeltaTable.create(
                self.place.uri,
                schema,
                mode="ignore",
                partition_by=list(self.partition_by),
                configuration=KEEP_LOG,
                storage_options=self.place.delta_options,
            )
        except CommitFailedError as error:
            raise self._busy() from error
        except (DeltaError, OSError) as error:
            raise StoreError(f"{self.place.uri}: the table cannot be made ({first_line(error)}).") from error

    def _open(self, version: int | None = None) -> DeltaTable | None:
        try:
            return self._open_once(version)
        except DamagedFilesError:
            raise
        except StoreError:  # a vacuum may have replaced commits with a checkpoint while they were read
            return self._open_once(version)

    def _open_once(self, version: int | None) -> DeltaTable | None:
        try:
            table = DeltaTable(self.place.uri, version=version, storage_options=self.place.delta_options)
            self._check_own(table)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            damage = self.log.find_damage()
            if damage is not None:
                raise damage from error
            at = "" if version is None else f" at version {version}"
            raise StoreError(f"{self.place.uri}: the table{at} cannot be read ({first_line(error)}).") from error
        return table

    def _check_own(self, table: DeltaTable) -> None:
        partitions = tuple(table.metadata().partition_columns)
        missing = [name for name in self.needs if name not in {field.name for field in table.schema().fields}]
        if partitions != self.partition_by or missing:
            found = f"partitioned by {', '.join(partitions) or 'nothing'}"
            found += f", without column {missing[0]}" if missing else ""
            raise ForeignTableError(
                f"{self.place.uri}: is a Delta table of another program ({found}); choose another folder for the store."
            )

    def _number(self, table: DeltaTable | None) -> int:
        return 0 if table is None else (table.transaction_version(APPLICATION) or 0)

    def _busy(self) -> StoreBusyError:
        return StoreBusyError(
            f"{self.place.uri}: another run committed first; nothing of this run was published. Run again: it reuses "
            "what is computed."
        )


def _delta_field(field: pa.Field) -> Field:
    return Schema.from_arrow(pa.schema([field])).fields[0]
