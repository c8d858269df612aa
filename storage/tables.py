"""Delta tables of files that we write ourselves: live files, one atomic commit, consistent reads.

Used for features and quarantine alike. A commit takes the version it was planned on and fails when another run has
committed since (`StoreBusyError`), also where neither removes what the other wrote: every commit carries Delta's
application transaction `frontalis`, and two of them on one base conflict. Which files are wanted is left to
`tasks.plan`, what is in them to `storage.features`.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Field, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from schemas.errors import StoreBusyError, StoreError
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


class FileTable:
    """A Delta table of files at a location, partitioned by `partition_by`."""

    def __init__(self, place: Location, partition_by: tuple[str, ...]) -> None:
        self.place = place
        self.partition_by = partition_by

    def snapshot(self, version: int | None = None) -> Snapshot:
        """Return the live files at a version, the newest by default.

        Raises:
            StoreError: the version is gone (vacuumed), or the log is damaged.
        """
        table = self._open(version)
        if table is None:
            if version is not None and version >= 0:
                raise StoreError(f"{self.place.uri}: there is no table, so no version {version}.")
            return NO_TABLE
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
            raise StoreError(f"{self.place.uri}: the commit failed ({error}). Nothing was published; rerun.") from error
        return self.snapshot()

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
            raise StoreError(f"{self.place.uri}: the table cannot be made ({error}).") from error

    def _open(self, version: int | None = None) -> DeltaTable | None:
        try:
            return DeltaTable(self.place.uri, version=version, storage_options=self.place.delta_options)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            at = "" if version is None else f" at version {version}"
            raise StoreError(f"{self.place.uri}: the table{at} cannot be read ({error}).") from error

    def _number(self, table: DeltaTable | None) -> int:
        return 0 if table is None else (table.transaction_version(APPLICATION) or 0)

    def _busy(self) -> StoreBusyError:
        return StoreBusyError(
            f"{self.place.uri}: another run committed first; nothing of this run was published. Run again: it reuses "
            "what is computed."
        )


def _delta_field(field: pa.Field) -> Field:
    return Schema.from_arrow(pa.schema([field])).fields[0]
