"""Feature files: written block by block, read as vectors, checked for damage.

The bytes of a file depend on its rows alone, so that equal names hold equal bytes. Vectors do not
compress: they are stored plain, without dictionary and statistics, in row groups of one block (measurements in
`docs/decisions.md`). Every file carries digests of itself (`storage.checksums`). Readers raise `DamagedFilesError`;
only `flows.reprocess` deletes a damaged file and computes it again. Which files are wanted is `tasks.plan`; committing
them is `storage.tables`.
"""

import contextlib
import errno
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import StoreError, first_line
from schemas.features import PARTITIONS, VECTOR, VECTOR_COLUMNS, FeatureKey
from storage.checksums import check_footer, check_whole, digesting_writer
from storage.delta_log import DamagedFilesError
from storage.layout import FEATURES, QUARANTINE
from storage.location import Location
from storage.tables import FileTable, LiveFile, Snapshot

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READERS = 4


def features_table(store: Location) -> FileTable:
    """Return the features table of a store."""
    return FileTable(store / FEATURES, PARTITIONS, ("id", "front"))


def quarantine_table(store: Location) -> FileTable:
    """Return the quarantine table of a store."""
    return FileTable(store / QUARANTINE, ("shard",), ("row", "reason"))


def feature_keys(snapshot: Snapshot) -> dict[FeatureKey, LiveFile]:
    """Return the feature files of a snapshot by key, in the order of their paths, without those of other programs."""
    keys = {}
    for path, file in sorted(snapshot.files.items()):
        with contextlib.suppress(StoreError):
            keys[FeatureKey.parse(path)] = file
    return keys


def parquet_writer(file: Any, schema: pa.Schema) -> contextlib.AbstractContextManager[pq.ParquetWriter]:
    """Open a writer of feature rows (no partition columns) into a stream that is open for writing."""
    dictionary = [f.name for f in schema if pa.types.is_string(f.type) and f.name != "id"]
    return digesting_writer(
        file, schema, compression="none", use_dictionary=dictionary or False, write_statistics=False
    )


def write_quarantine(place: Location, rows: pa.Table) -> None:
    """Write the quarantined rows of a shard, no partition column, as the file `place`."""
    with (
        place.writing() as file,
        digesting_writer(file, rows.schema, compression="zstd", write_statistics=False) as writer,
    ):
        writer.write_table(rows)


def vector_column(matrix: npt.NDArray[np.float32]) -> pa.ListArray:
    """Return `[n, D]` float32 as a column of lists, without a copy where the matrix is contiguous."""
    n, dim = matrix.shape
    offsets = pa.array(np.arange(0, (n + 1) * dim, dim, dtype=np.int32)[: n + 1] if dim else np.zeros(n + 1, np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(matrix).reshape(-1)), type=VECTOR)


def matrix_of(column: pa.Array | pa.ChunkedArray, what: str) -> npt.NDArray[np.float32]:
    """Return a vector column as `[n, D]` float32, without a copy where it is one chunk.

    Raises:
        StoreError: rows differ in length, or a vector is null. `what` names the file.
    """
    if isinstance(column, pa.ChunkedArray) and column.num_chunks != 1:
        parts = [matrix_of(chunk, what) for chunk in column.chunks if len(chunk)]
        if len({part.shape[1] for part in parts}) > 1:
            raise _uneven(what)
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    n = len(array)
    if n == 0:
        return np.zeros((0, 0), np.float32)
    offsets = array.offsets.to_numpy()
    dim = int(offsets[1] - offsets[0])
    if array.null_count or not (np.diff(offsets) == dim).all():
        raise _uneven(what)
    flat = array.values.to_numpy()[offsets[0] : offsets[-1]]
    return np.asarray(flat, dtype=np.float32).reshape(n, dim)


def _uneven(what: str) -> StoreError:
    return StoreError(f"{what}: the vectors differ in length or are missing; run `frontalis verify --store …`.")


def read_rows(table: FileTable, file: LiveFile, columns: Sequence[str], rows: int = 65_536) -> Iterator[pa.RecordBatch]:
    """Yield all rows of one feature file in batches; the footer and every page read are checked.

    Raises:
        StoreError: see `opened`.
    """
    with opened(table, file) as parquet:
        count = 0
        for batch in parquet.iter_batches(batch_size=rows, columns=list(columns)):
            count += batch.num_rows
            yield batch
        if count != file.rows:
            raise pa.ArrowInvalid(f"{count} rows could be read instead of {file.rows}")


def take_rows(table: FileTable, file: LiveFile, columns: Sequence[str], at: npt.NDArray[np.int64]) -> pa.Table:
    """Return the rows of one feature file whose numbers are in `at` (ascending, at least one), as they are there.

    Row groups without any of them are not read.

    Raises:
        StoreError: see `opened`.
    """
    with opened(table, file) as parquet:
        sizes = np.array([parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)])
        ends = np.cumsum(sizes)
        group_of = np.searchsorted(ends, at, side="right")
        wanted = np.unique(group_of)
        skipped = ends - np.cumsum(np.where(np.isin(np.arange(len(sizes)), wanted), sizes, 0))
        place = at - skipped[group_of]  # among the rows of the groups that are read
        parts, start = [], 0
        for batch in parquet.iter_batches(columns=list(columns), row_groups=wanted.tolist()):
            first, last = np.searchsorted(place, [start, start + batch.num_rows])
            parts.append(pa.Table.from_batches([batch]).take(pa.array(place[first:last] - start)))
            start += batch.num_rows
        if start != sizes[wanted].sum():
            raise pa.ArrowInvalid(f"{start} rows could be read instead of {sizes[wanted].sum()}")
    return pa.concat_tables(parts)


@contextlib.contextmanager
def opened(table: FileTable, file: LiveFile) -> Iterator[pq.ParquetFile]:
    """Open one feature file with its footer checked; whatever page is read from it is checked, too.

    Raises:
        DamagedFilesError: the bytes are not those that were written, also where that shows only while they are read.
        StoreError: the file is missing, or cannot be read now.
    """
    place = table.place / file.path
    try:
        with place.open_input() as stream:
            metadata = check_footer(stream)
            if metadata.num_rows != file.rows:
                raise pa.ArrowInvalid(f"{metadata.num_rows} rows instead of {file.rows}")
            yield pq.ParquetFile(stream, metadata=metadata, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise _missing(place) from error
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:  # of what is written from it
            raise
        why = first_line(error, 120)
        if _damage(place, file.rows) is None:
            raise StoreError(f"{place.uri}: cannot be read now ({why}); run again.") from error
        raise DamagedFilesError([place], why) from error


def check_files(table: FileTable, files: Iterable[LiveFile]) -> None:
    """Read all bytes of some files.

    Raises:
        DamagedFilesError: some are damaged.
        StoreError: one is missing, or cannot be read now.
    """
    files = list(files)
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda file: _damage(table.place / file.path, file.rows), files))
    damaged = [(file, why) for file, why in zip(files, found, strict=True) if why is not None]
    if damaged:
        raise DamagedFilesError([table.place / file.path for file, _ in damaged], damaged[0][1])


def read_table(table: FileTable, files: Iterable[LiveFile], columns: Sequence[str]) -> pa.Table:
    """Return the rows of several files as one table, partition columns added where asked for. Raises StoreError."""
    inside = [name for name in columns if name not in PARTITIONS]
    parts = []
    for file in files:
        for batch in read_rows(table, file, inside):
            part = pa.Table.from_batches([batch])
            for name in columns:
                if name in PARTITIONS:
                    part = part.append_column(name, pa.repeat(pa.scalar(file.partitions[name]), part.num_rows))
            parts.append(part.select(list(columns)))
    if not parts:
        return pa.table({name: pa.array([], VECTOR if name in VECTOR_COLUMNS else pa.string()) for name in columns})
    return pa.concat_tables(parts, promote_options="default")


def complete_rows(place: Location) -> int | None:
    """Return the number of rows of a file, or None where it is missing, truncated or damaged."""
    try:
        with place.open_input() as stream:
            return int(check_whole(stream).num_rows)
    except _UNREADABLE:
        return None


# What reading wrong bytes raises: beside Arrow's own errors, text that is no UTF-8 and names that are not there.
_UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError)


def _damage(place: Location, rows: int) -> str | None:
    """Return what is wrong with the bytes of a file, or None where they are as written.

    Raises:
        StoreError: it is missing, or the storage does not give them now.
    """
    try:
        with place.open_input() as stream:
            found = check_whole(stream).num_rows
    except FileNotFoundError as error:
        raise _missing(place) from error
    except pa.ArrowInvalid as error:
        return str(error)
    except OSError as error:
        raise StoreError(f"{place.uri}: cannot be read now ({first_line(error, 120)}); run again.") from error
    return None if found == rows else f"{found} rows instead of {rows}"


def _missing(place: Location) -> StoreError:
    return StoreError(f"{place.uri}: is missing; run `frontalis reprocess` to compute it again.")
