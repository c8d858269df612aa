"""Read Parquet in blocks of bounded memory, also where a small file unpacks to a very large one.

Dictionaries, run lengths and compression let a few kilobytes stand for gigabytes. So the footer decides how many rows
are decoded at once, and a block that would grow beyond its bound makes the shard a bad one. The footer is trusted, and
one page is always unpacked whole. What the rows mean is left to `schemas.shards`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import BadShardError
from schemas.features import BLOCK_ROWS

# Column chunks are read through a buffer of this size rather than whole, so a huge row group stays bounded in memory.
READ_BUFFER = 1 << 20
# A block may take the two bounds below times its rows, or times BLOCK_ROWS where it is shorter.
# Numbers a row of an embedding, on average over a block: twice the longest that recognisers commonly give (4,096).
NUMBERS = 8192
# Bytes a row, on average over a block, of one column of text or bytes. Ids, names and paths stay far below.
TEXT_BYTES = 16_384
# What a column may decode to before it is measured: enough for 16,384 rows of 512 numbers.
DECODED_BYTES = 32 << 20
# What one column of a row group may unpack to, unless it takes more than 1/64 of that in the file. Embeddings hardly
# compress; even those of one bit a number take 1/32.
UNPACKED_BYTES = 128 << 20
UNPACKED_RATIO = 64


def open_parquet(file: Any, **options: Any) -> pq.ParquetFile:
    """Open a file for streaming. Raises OSError, pa.ArrowException."""
    return pq.ParquetFile(
        file, buffer_size=READ_BUFFER, pre_buffer=False, page_checksum_verification=True, memory_map=False, **options
    )


def read_blocks(file: Any, name: str, columns: Sequence[str], rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield (first row number, block) of consecutive `rows` rows in file order, the tail shorter.

    Blocks cross row groups, so how a file was cut never shows in them. Memory: a few blocks.

    Args:
        file: an open file.
        name: how messages call it: `shard part-07`.
        columns: top-level columns to read.
        rows: rows of a block.

    Raises:
        BadShardError: a column unpacks to far more than embeddings, ids and names do.
        OSError, pa.ArrowException: a page cannot be read.
    """
    parquet = open_parquet(file)
    kinds = {column: _kind(parquet.schema_arrow, column) for column in columns}
    limits = {column: limit for column, kind in kinds.items() if (limit := _row_limit(kind))}
    together = rows
    for column in limits:
        together = _rows_at_once(file, parquet, name, column, kinds[column], together)
    first, sizes = 0, dict.fromkeys(limits, 0)
    pending: list[pa.RecordBatch] = []
    # Not every version of the reader fills a batch across row groups, so blocks are cut here.
    for batch in parquet.iter_batches(batch_size=together, columns=list(columns), use_threads=False):
        pending.append(batch)
        for column, limit in limits.items():
            sizes[column] += _size(batch.column(column))
            if sizes[column] > limit * max(rows, BLOCK_ROWS):
                largest = max(_size(batch.column(column).slice(row, 1)) for row in range(batch.num_rows))
                raise BadShardError(
                    f"{name}: column {column!r} unpacks to {sizes[column]:,} bytes in the rows from {first:,} on, one "
                    f"value to {largest:,}; at most {limit:,} a row are taken on average. Shorten the values, or leave "
                    "the column out."
                )
        while sum(part.num_rows for part in pending) >= rows:
            whole = pa.concat_batches(pending) if len(pending) > 1 else pending[0]
            yield first, whole.slice(0, rows)
            first += rows
            rest = whole.slice(rows)
            pending = [rest] if rest.num_rows else []
            sizes = {column: _size(rest.column(column)) if pending else 0 for column in limits}
    if pending:
        yield first, pa.concat_batches(pending) if len(pending) > 1 else pending[0]


def _kind(schema: pa.Schema, column: str) -> pa.DataType:
    at = schema.get_field_index(column)
    kind = schema.field(at).type if at >= 0 else pa.null()
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _row_limit(kind: pa.DataType) -> int:
    """Return the bytes that a row may take on average, 0 for columns that cannot take many."""
    if pa.types.is_fixed_size_binary(kind):
        return NUMBERS * 4
    return NUMBERS * _number_bytes(kind) or (TEXT_BYTES if _is_text(kind) else 0)


def _rows_at_once(file: Any, parquet: pq.ParquetFile, name: str, column: str, kind: pa.DataType, rows: int) -> int:
    """Return how many of `rows` rows may be decoded together, by the largest row that the column may have."""
    if pa.types.is_fixed_size_binary(kind):
        return min(rows, max(1, DECODED_BYTES // int(kind.byte_width)))
    if pa.types.is_fixed_size_list(kind):
        rows = min(rows, max(1, DECODED_BYTES // (int(kind.list_size) * _number_bytes(kind))))
    for number, in_group, chunk in _chunks(parquet, column):
        packed = chunk.total_compressed_size
        unpacked = chunk.num_values * _number_bytes(kind) or chunk.total_uncompressed_size
        if unpacked > max(UNPACKED_BYTES, UNPACKED_RATIO * packed):
            raise BadShardError(
                f"{name}: column {column!r} unpacks from {packed:,} to {unpacked:,} bytes in row group {number} of "
                f"{in_group:,} rows; shorten the values, or write smaller row groups."
            )
        largest = -(-unpacked // in_group)
        if _is_text(kind) and unpacked * min(in_group, rows) > DECODED_BYTES:
            largest = max(largest, _longest_coded(file, parquet, column, number, chunk))
        rows = min(rows, max(1, DECODED_BYTES // max(largest, 1)))
    return rows


def _chunks(parquet: pq.ParquetFile, column: str) -> Iterator[tuple[int, int, pq.ColumnChunkMetaData]]:
    """Yield (number of the row group, its rows, chunk) for the leaves of a column in all row groups with rows."""
    metadata = parquet.metadata
    paths = [parquet.schema.column(at).path for at in range(metadata.num_columns)]
    leaves = [at for at, path in enumerate(paths) if path == column or path.startswith(f"{column}.")]
    hollow = open_parquet(pa.BufferReader(b""), metadata=metadata)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if not group.num_rows:
            continue
        _refuse_encrypted(hollow, number, column)
        if group.num_columns != metadata.num_columns:
            raise OSError(f"row group {number} has {group.num_columns} columns of {metadata.num_columns}")
        for at in leaves:
            yield number, group.num_rows, group.column(at)


def _refuse_encrypted(hollow: pq.ParquetFile, group: int, column: str) -> None:
    """Raise OSError where the column is encrypted: to ask for its sizes would abort the process (pyarrow 26).

    `hollow` has the footer of the file and no data, so any other error of it is ignored.
    """
    try:
        next(hollow.iter_batches(batch_size=1, row_groups=[group], columns=[column], use_threads=False), None)
    except (OSError, pa.ArrowException) as error:
        if "crypt" in str(error):
            raise


def _longest_coded(file: Any, parquet: pq.ParquetFile, column: str, group: int, chunk: pq.ColumnChunkMetaData) -> int:
    """Return the most bytes of a value that may stand in the file once and in many rows."""
    if "DELTA_BYTE_ARRAY" not in chunk.encodings:  # there each value may begin with all of the one before
        coded = open_parquet(file, metadata=parquet.metadata, read_dictionary=[column])
        batch = next(coded.iter_batches(batch_size=1, row_groups=[group], columns=[column], use_threads=False))
        values = _plain_storage(batch.column(0))
        if pa.types.is_dictionary(values.type):
            return int(pc.max(_lengths(values.dictionary)).as_py() or 0)
    return int(chunk.total_uncompressed_size)


def _size(column: pa.Array) -> int:
    """Return the bytes that the values of a column take as plain arrays."""
    column = _plain_storage(column)
    kind = column.type
    if pa.types.is_dictionary(kind):
        lengths = _lengths(column.dictionary).take(column.indices)
    elif pa.types.is_fixed_size_binary(kind):
        return len(column) * int(kind.byte_width)
    elif pa.types.is_fixed_size_list(kind):  # a null row takes as much room as the others
        return len(column) * int(kind.list_size) * _number_bytes(kind)
    else:
        lengths = pc.list_value_length(column) if _number_bytes(kind) else _lengths(column)
    return int(pc.sum(lengths).as_py() or 0) * (_number_bytes(kind) or 1)


def _plain_storage(column: pa.Array) -> pa.Array:
    return column.storage if isinstance(column, pa.ExtensionArray) else column


def _lengths(text: pa.Array) -> pa.Array:
    """Return the bytes of each value. Arrow has no such function for views."""
    if pa.types.is_string_view(text.type) or pa.types.is_binary_view(text.type):
        text = text.cast(pa.large_binary())
    return pc.binary_length(text)


def _number_bytes(kind: pa.DataType) -> int:
    """Return the bytes of a number in a list of floats, 0 for any other type."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return int(kind.value_type.bit_width // 8) if lists and pa.types.is_floating(kind.value_type) else 0


def _is_text(kind: pa.DataType) -> bool:
    return kind in _TEXT


_TEXT = {pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()}
