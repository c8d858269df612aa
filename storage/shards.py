"""Reading shards: finding them under a source, detecting that one changed, and streaming its rows in blocks.

What a shard must look like is `schemas.shards`; what is done with a bad one is decided by the tasks. Every failure to
read a file is a `BadShardError` that names the shard.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import BadShardError, SettingsError, StoreError
from schemas.features import DIGEST_BYTES, printable, shard_key
from storage.blocks import open_parquet, read_blocks
from storage.location import Location, digest_file

SUFFIXES = (".parquet", ".pq")
ETAG_REQUESTS = 16


@dataclass(frozen=True)
class Shard:
    """A shard found under a source. `change` differs whenever the file is rewritten, even with equal size and mtime."""

    key: str
    uri: str
    size: int
    mtime_ns: int
    change: str

    @property
    def place(self) -> Location:
        """The location of the file."""
        return Location(self.uri)


def find_shards(source: Location) -> list[Shard]:
    """List the shards of a source, ordered by key: a folder (searched through), or one Parquet file.

    Names that begin with `.` or `_` are skipped, as other Parquet tools do.

    Raises:
        SettingsError: the source does not exist, holds no Parquet file, or two files would get one key.
        StoreError: a folder cannot be read, or a broken link may stand for a folder: its shards would be missing from
            the next release. A broken link with the name of a shard is a shard that cannot be read.
    """
    if not source.exists():
        raise SettingsError(f"source {source.uri}: does not exist; pass a folder of Parquet shards.")
    itself = source.entry() if source.size() is not None else None
    below = [] if itself else source.files(*SUFFIXES, whole=True)
    found = [(source, itself)] if itself else [(source / entry.name, entry) for entry in below]
    if not found:
        raise SettingsError(f"source {source.uri}: holds no .parquet file.")
    with ThreadPoolExecutor(ETAG_REQUESTS) as pool:  # object storage lists no ETags
        changes = pool.map(lambda one: one[1].change or one[0].etag(), found)
        shards: dict[str, Shard] = {}
        for (file, entry), change in zip(found, changes, strict=True):
            key = shard_key(entry.name.rsplit(".", 1)[0])
            if key in shards:
                raise SettingsError(
                    f"source {source.uri}: {entry.name!r} and {shards[key].uri!r} share the name {key!r}; rename one."
                )
            shards[key] = Shard(key, printable(file.uri), entry.size, entry.mtime_ns, change)
    return [shards[key] for key in sorted(shards)]


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
    return entry is not None and (entry.size, entry.mtime_ns, entry.change) == (
        shard.size,
        shard.mtime_ns,
        shard.change,
    )


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
    """Return the Arrow schema and the number of rows. Raises BadShardError."""
    with open_shard(shard) as parquet:
        return parquet.schema_arrow, int(parquet.metadata.num_rows)


def stream_blocks(shard: Shard, columns: Sequence[str], rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield (first row number, block) of consecutive `rows` rows in file order, the tail shorter.

    Blocks cross row groups, so how a file was cut never shows in them. Memory: a few blocks.

    Raises:
        BadShardError: a page cannot be read, or a column unpacks to too much.
    """
    with _as_bad_shard(shard), shard.place.open_input() as file:
        yield from read_blocks(file, f"shard {shard.key}", columns, rows)


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
        why = (str(error.__cause__ or error).splitlines() or ["no reason given"])[0][:200]
        raise BadShardError(
            f"shard {shard.key}: {shard.uri} cannot be read as Parquet ({why}); write it again."
        ) from error
