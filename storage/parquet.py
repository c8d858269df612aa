"""Small Parquet files as bytes: manifest, releases and id maps are read and written whole.

Reading goes through one synchronous reader on purpose. `pyarrow.parquet.read_table` over Python-owned memory leaves
work to background threads, which may release that memory while the interpreter exits and abort the process (seen in
about one exit of fifty).
"""

import pyarrow as pa
import pyarrow.parquet as pq


def to_parquet(table: pa.Table) -> bytes:
    """Return a table as the bytes of a Parquet file, equal for equal tables."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def from_parquet(content: bytes) -> pa.Table:
    """Return the table in the bytes of a Parquet file, verifying the checksum of every page.

    Raises `pa.ArrowException` or `OSError` where there is none, or a damaged one.
    """
    reader = pa.BufferReader(content)
    return pq.ParquetFile(reader, pre_buffer=False, page_checksum_verification=True).read(use_threads=False)
