"""Small Parquet files as bytes: census, releases and id maps are read and written whole.

Reading goes through one synchronous reader on purpose. `pyarrow.parquet.read_table` over Python-owned memory leaves
work to background threads, which may release that memory while the interpreter exits and abort the process (seen in
about one exit of fifty).
"""

import pyarrow as pa
import pyarrow.parquet as pq


def to_parquet(table: pa.Table) -> bytes:
    """Return a table as the bytes of a Parquet file, equal for equal tables."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def from_parquet(content: bytes) -> pa.Table:
    """Return the table in the bytes of a Parquet file. Raises `pa.ArrowException` or `OSError` where there is none."""
    return pq.ParquetFile(pa.BufferReader(content), pre_buffer=False).read(use_threads=False)
