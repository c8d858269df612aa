"""Parquet files with digests of themselves, so that any flipped bit is found.

Pages have checksums, but the footer and the headers between the pages have none, and a bit flipped there loses rows
without an error. So 32 bytes are written before the footer, where Parquet readers skip them: the XXH3 digest of the
footer, which is checked whenever a file is opened, and that of all other bytes, which costs reading them all.
Nothing is stored elsewhere, so a file that is not live yet can be checked, too.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

MAGIC = b"PAR1"
DIGEST = 16
DIGESTS = 2 * DIGEST
PIECE = 8 << 20
TAIL = 64 << 10  # one request fetches most footers


@contextlib.contextmanager
def digesting_writer(file: Any, schema: pa.Schema, **options: Any) -> Iterator[pq.ParquetWriter]:
    """Open a Parquet writer into a stream that is open for writing; the digests are written with the footer."""
    stream = _DigestingStream(file)
    writer = pq.ParquetWriter(stream, schema, write_page_checksum=True, store_schema=False, **options)
    try:
        yield writer
        stream.tail = bytearray()
    finally:
        writer.close()
    stream.finish()


def check_footer(stream: pa.NativeFile) -> pq.FileMetaData:
    """Compare the footer with its digest, and return what it says.

    Raises:
        pa.ArrowInvalid: it is not the footer that was written, or there are no digests.
    """
    return pq.read_metadata(pa.BufferReader(_footer(stream)[0]))


def check_whole(stream: pa.NativeFile) -> pq.FileMetaData:
    """Compare all bytes with their digest, and return what the footer says.

    Raises:
        pa.ArrowInvalid: a byte is not the one that was written.
    """
    footer, digests = _footer(stream)
    state = xxhash.xxh3_128()
    stream.seek(0)
    left = stream.size() - len(footer) - DIGESTS
    while left:
        piece = stream.read(min(PIECE, left))
        if not piece:
            raise pa.ArrowInvalid("the file ends early")
        state.update(piece)
        left -= len(piece)
    state.update(footer)
    if state.digest() != digests[DIGEST:]:
        raise pa.ArrowInvalid("its digest differs")
    return pq.read_metadata(pa.BufferReader(footer))


def _footer(stream: pa.NativeFile) -> tuple[bytes, bytes]:
    """Return the footer with its length and magic, and the digests before it."""
    size = stream.size()
    tail = _last(stream, size, min(size, TAIL))
    if tail[-4:] != MAGIC or len(tail) < 8:
        raise pa.ArrowInvalid("it does not end as a Parquet file")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length + DIGESTS > size:
        raise pa.ArrowInvalid("its footer is longer than the file")
    if length + DIGESTS > len(tail):
        tail = _last(stream, size, length + DIGESTS)
    footer, digests = tail[-length:], tail[-length - DIGESTS : -length]
    if xxhash.xxh3_128_digest(footer) != digests[:DIGEST]:
        raise pa.ArrowInvalid("the digest of its footer differs")
    return footer, digests


def _last(stream: pa.NativeFile, size: int, count: int) -> bytes:
    stream.seek(size - count)
    return bytes(stream.read(count))


class _DigestingStream:
    """The stream that pyarrow writes to. Once `tail` is set, further bytes are buffered there until `finish`."""

    closed = False

    def __init__(self, file: Any) -> None:
        self.file = file
        self.state = xxhash.xxh3_128()
        self.tail: bytearray | None = None

    def write(self, data: Any) -> int:
        if self.tail is not None:
            self.tail += data
            return len(data)
        self.state.update(data)
        self.file.write(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()

    def finish(self) -> None:
        assert self.tail is not None
        last, self.tail = bytes(self.tail), None
        footer = last[-int.from_bytes(last[-8:-4], "little") - 8 :]
        self.write(last[: -len(footer)])
        self.state.update(footer)
        self.file.write(xxhash.xxh3_128_digest(footer) + self.state.digest() + footer)
