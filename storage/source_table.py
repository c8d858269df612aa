"""A Delta table as source: the files of its newest version, with their partition values.

Files that the log has removed are never read. The table belongs to another program: nothing is written to it.
"""

import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from schemas.errors import SettingsError, StoreError, first_line
from schemas.settings import ColumnNames
from storage.location import FileEntry, Location
from storage.partitions import Partition, Partitions

LOG = "_delta_log"


@dataclass(frozen=True)
class LiveFiles:
    """The files of a Delta table at `version`: entries as the log describes them, and partitions of each."""

    version: int
    files: list[tuple[FileEntry, Partitions]]


def is_table(source: Location) -> bool:
    """Return whether the folder is a Delta table."""
    return (source / LOG).exists()


def refuse_part_of_table(source: Location) -> None:
    """Refuse a folder or file inside a Delta table.

    Raises:
        SettingsError: it may hold rows that were deleted in the table.
    """
    for above in source.parents:
        if _looks_like_table(above):
            raise SettingsError(
                f"source {source.uri}: is inside the Delta table {above.uri}, so it may hold rows that were deleted "
                "there; pass the table."
            )


def refuse_tables_below(source: Location, names: Iterable[str]) -> None:
    """Refuse a folder with a Delta table somewhere below.

    Args:
        source: the folder.
        names: all files below it, hidden ones included.

    Raises:
        SettingsError: the folder holds a table, whose deleted rows would be read as well.
    """
    for name in names:
        table, log, _ = name.partition(f"/{LOG}/")
        if log and not any(step[:1] in "._" for step in table.split("/")):
            raise SettingsError(
                f"source {source.uri}: {table} below it is a Delta table, of which a folder would give deleted rows "
                "as well; pass the table itself."
            )


def live_files(source: Location, columns: ColumnNames) -> LiveFiles:
    """Read the newest version of a Delta table.

    A column that the table has and a file lacks, because it was added later, is null in that file.

    Raises:
        SettingsError: the log cannot be read; or files hold rows that a deletion vector deletes, columns are mapped to
            other names, or a file is outside the table.
    """
    try:
        table = DeltaTable(source.uri, storage_options=source.delta_options)
        mapping = table.metadata().configuration.get("delta.columnMapping.mode") or "none"
        actions = pa.table(table.get_add_actions(flatten=True)).to_pylist()
        schema = pa.schema(table.schema().to_arrow())
        vectors = _has_deletion_vectors(table)
    except (DeltaError, OSError, ValueError) as error:
        why = first_line(error, 200)
        raise SettingsError(f"source {source.uri}: its Delta log cannot be read ({why}).") from error
    if mapping != "none":
        raise SettingsError(
            f"source {source.uri}: columns of the Delta table are mapped by {mapping} (delta.columnMapping.mode), "
            "which is not supported; write the table without column mapping."
        )
    if vectors:
        raise SettingsError(
            f"source {source.uri}: version {table.version()} of the Delta table deletes rows by deletion vectors, "
            "which are not supported; rewrite those files (REORG TABLE … APPLY (PURGE))."
        )
    roles = {columns.subject, columns.pose, columns.yaw, columns.pitch, columns.roll, *columns.keep}
    files = []
    for action in actions:
        name = urllib.parse.unquote(action["path"])
        if "://" in name or name.startswith("/") or ".." in name.split("/"):
            raise SettingsError(
                f"source {source.uri}: the Delta table lists {name}, which is outside of it (a shallow clone?); copy "
                "the table whole."
            )
        partitions = tuple(
            Partition(field.name, pa.scalar(action.get(f"partition.{field.name}"), field.type))
            for field in schema
            if field.name in roles or (field.name == columns.id and f"partition.{field.name}" in action)
        )
        entry = FileEntry(name, action["size_bytes"], action["modification_time"] * 1_000_000, "")
        files.append((entry, partitions))
    return LiveFiles(table.version(), files)


def _has_deletion_vectors(table: DeltaTable) -> bool:
    try:
        return any(batch.num_rows for batch in table.deletion_vectors())
    except DeltaError as error:
        if "eletion" not in str(error):
            raise
        return True  # one that cannot be read


def _looks_like_table(folder: Location) -> bool:
    try:
        return is_table(folder)
    except StoreError:  # a folder above that may not be listed
        return False
