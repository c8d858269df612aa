"""Reading shards: finding them under a source, detecting that one changed, and streaming its rows in blocks.

A source is a folder, a Delta table (`storage.source_table`) or one file. Columns that all rows of a shard share may
come from the names of its folders or from the log (`storage.partitions`); here they read like columns of the file.

What a shard must look like is `schemas.shards`; what is done with a bad one is decided by the tasks. Every failure to
read a file is a `BadShardError` that names the shard.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import BadShardError, SettingsError, StoreError, first_line
from schemas.features import DIGEST_BYTES, printable, shard_key
from schemas.settings import ColumnNames
from storage.blocks import open_parquet, read_blocks
from storage.location import FileEntry, Location, digest_file
from storage.partitions import Partition, Partitions, hive_partitions
from storage.source_table import is_table, live_files, refuse_part_of_table, refuse_tables_below

SUFFIXES = (".parquet", ".pq")
ETAG_REQUESTS = 16


@dataclass(frozen=True)
class Shard:
    """A shard found under a source. `change` differs whenever the file is rewritten, even with equal size and mtime.

    `partitions` are columns that all rows share. `version` is that of the Delta table whose log lists the file, None
    outside of a table; such a file never changes, so size and time are those in the log.
    """

    key: str
    uri: str
    size: int
    mtime_ns: int
    change: str
    partitions: Partitions = ()
    version: int | None = None

    @property
    def place(self) -> Location:
        """The location of the file."""
        return Location(self.uri)


def find_shards(source: Location, columns: ColumnNames | None = None) -> list[Shard]:
    """List the shards of a source, ordered by key: a folder (searched through), a Delta table, or one Parquet file.

    Names that begin with `.` or `_` are skipped, as other Parquet tools do. Of a Delta table only the files of its
    newest version are shards.

    Args:
        source: where to look.
        columns: names of the columns, of which some may come from the names of folders.

    Raises:
        SettingsError: the source does not exist, holds no Parquet file, or two files would get one key; it is a Delta
            table that cannot be read, is inside of one, or holds one.
        StoreError: a folder cannot be read, or a broken link may stand for a folder: its shards would be missing from
            the next release. A broken link with the name of a shard is a shard that cannot be read.
    """
    columns = columns or ColumnNames()
    if not source.exists():
        raise SettingsError(f"source {source.uri}: does not exist; pass a folder of Parquet shards.")
    refuse_part_of_table(source)
    version = None
    if is_table(source):
        table = live_files(source, columns)
        version, found = table.version, [(source / entry.name, entry, at) for entry, at in table.files]
    elif source.size() is not None:
        itself = source.entry()
        found = [(source, itself, ())] if itself else []
    else:
        found = _files_of_folder(source, columns)
    if not found:
        what = "no .parquet file" if version is None else f"no file at version {version} of the Delta table"
        raise SettingsError(f"source {source.uri}: holds {what}.")
    shards: dict[str, Shard] = {}
    for file, entry, partitions in found:
        stem = entry.name.rsplit(".", 1)[0]
        key = shard_key(stem)
        if key in shards:
            raise SettingsError(
                f"source {source.uri}: {entry.name!r} and {shards[key].uri!r} share the name {key!r}; rename one."
            )
        shards[key] = Shard(key, printable(file.uri), entry.size, entry.mtime_ns, entry.change, partitions, version)
    return [shards[key] for key in sorted(shards)]


def _files_of_folder(source: Location, columns: ColumnNames) -> list[tuple[Location, FileEntry, Partitions]]:
    everything = source.walk()
    refuse_tables_below(source, (entry.name for entry in everything))
    entries = source.select(everything, *SUFFIXES, whole=True)
    files = [source / entry.name for entry in entries]
    with ThreadPoolExecutor(ETAG_REQUESTS) as pool:  # object storage lists no ETags
        changes = pool.map(lambda one: one[1].change or one[0].etag(), zip(files, entries, strict=True))
        entries = [replace(entry, change=change) for entry, change in zip(entries, changes, strict=True)]
    return list(zip(files, entries, hive_partitions([entry.name for entry in entries], columns), strict=True))


def refuse_nested(source: Location, store: Location) -> None:
    """Refuse a source and a store of which one is inside the other.

    Raises:
        SettingsError: the store's own files would be read as shards.
    """
    if source.overlaps(store):
        raise SettingsError(
            f"source {source.uri} and store {store.uri}: one is inside the other, so files of the store would be read "
            "as shards; choose a store beside the source."
        )


def still_same(shard: Shard) -> bool:
    """Return whether the shard's file is the one that was found: not rewritten, replaced or removed since."""
    entry = shard.place.entry()
    if entry is None or shard.version is not None:
        return entry is not None and entry.size == shard.size
    return (entry.size, entry.mtime_ns, entry.change) == (shard.size, shard.mtime_ns, shard.change)


def content_digest(shard: Shard) -> str:
    """Return the digest of the shard's bytes (BLAKE2b, 128 bit, hex).

    Raises:
        BadShardError: the file cannot be read.
    """
    with _as_bad_shard(shard):
        return digest_file(shard.place, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES))


@contextlib.contextmanager
def open_shard(shard: Shard) -> Iterator[pq.ParquetFile]:
    """Open a shard as Parquet.

    Raises:
        BadShardError: the file is unreadable, truncated, encrypted or no Parquet, also when found while reading rows.
    """
    with _as_bad_shard(shard), shard.place.open_input() as file:
        yield open_parquet(file)


def read_schema(shard: Shard) -> tuple[pa.Schema, int]:
    """Return the Arrow schema, partitions included, and the number of rows. Raises BadShardError."""
    with open_shard(shard) as parquet:
        schema, rows = parquet.schema_arrow, int(parquet.metadata.num_rows)
    for one in _beside(shard, schema):
        schema = schema.append(pa.field(one.name, one.value.type))
    return schema, rows


def stream_blocks(shard: Shard, columns: Sequence[str], rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield (first row number, block) of consecutive `rows` rows in file order, the tail shorter.

    Blocks cross row groups, so how a file was cut never shows in them. Memory: a few blocks.

    Raises:
        BadShardError: a page cannot be read, or a column unpacks to too much.
    """
    with _as_bad_shard(shard), shard.place.open_input() as file:
        beside: dict[str, Partition] = {}
        if shard.partitions:
            found = {one.name: one for one in _beside(shard, open_parquet(file).schema_arrow)}
            beside = {name: found[name] for name in columns if name in found}
        inside = [name for name in columns if name not in beside]
        for first, block in read_blocks(file, f"shard {shard.key}", inside, rows):
            yield first, _with(block, beside.values())


def _with(block: pa.RecordBatch, partitions: Iterable[Partition]) -> pa.RecordBatch:
    for one in partitions:
        block = block.append_column(one.name, one.column(block.num_rows))
    return block


def _beside(shard: Shard, schema: pa.Schema) -> Partitions:
    """Return the partitions that are not columns of the file as well: there the file is right."""
    return tuple(one for one in shard.partitions if one.name not in schema.names)


@contextlib.contextmanager
def _as_bad_shard(shard: Shard) -> Iterator[None]:
    try:
        yield
    except BadShardError:
        raise
    except FileNotFoundError as error:
        raise BadShardError(
            f"shard {shard.key}: {shard.uri} cannot be found; it vanished meanwhile, or its name is not UTF-8."
        ) from error
    except (StoreError, pa.ArrowException, OSError, UnicodeError) as error:
        # A StoreError here is about this one file, such as a missing permission; the store itself is not touched.
        why = first_line(error.__cause__ or error, 200)
        raise BadShardError(
            f"shard {shard.key}: {shard.uri} cannot be read as Parquet ({why}); write it again."
        ) from error
