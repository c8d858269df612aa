"""FAISS indexes as verified bytes: written to any stream with a digest, read back only as they were written.

FAISS trusts what it reads, so every byte is compared before it is handed over. What an index is for, and where its file
lies, is left to `storage.vectors.index` and its callers.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, BinaryIO

import faiss

from schemas.errors import StoreError

_PIECE = 8 * 2**20


@dataclass(frozen=True)
class Written:
    """What was written: the BLAKE2b-128 of the bytes as 32 hexadecimal digits, and their number."""

    digest: str
    size: int


def write_faiss(index: Any, file: BinaryIO) -> Written:
    """Stream a `faiss.Index` into `file` (any object with `write`), hashing on the way."""
    digest, size = blake2b(digest_size=16), 0

    def take(piece: bytes) -> int:
        nonlocal size
        file.write(piece)
        digest.update(piece)
        size += len(piece)
        return len(piece)

    faiss.write_index(index, faiss.PyCallbackIOWriter(take, _PIECE))  # type: ignore[attr-defined]
    return Written(digest.hexdigest(), size)


def read_faiss(file: BinaryIO, digest: str, max_bytes: int, name: str) -> Any:
    """Read a `faiss.Index` once all bytes of its file are known to be those that were written.

    The file is read twice and held once. The first pass checks its digest and remembers a digest of every piece; the
    second hands a piece to FAISS only if it is still the same, so a file changed in between cannot slip through.

    Args:
        file: seekable, at its start.
        digest: `Written.digest`, as recorded in the release.
        max_bytes: what may be read; a longer file is refused without reading on.
        name: how messages call the file.

    Raises:
        StoreError: too long, another digest, changed while it was read, or not an index of this FAISS.
    """
    pieces, whole, size = [], blake2b(digest_size=16), 0
    while piece := file.read(_PIECE):
        size += len(piece)
        if size > max_bytes:
            raise StoreError(f"{name} is longer than the {max_bytes:,} bytes that may be read; raise the limit")
        whole.update(piece)
        pieces.append((len(piece), _digest(piece)))
    if whole.hexdigest() != digest:
        raise StoreError(
            f"{name}: its bytes have digest {whole.hexdigest()}, the release recorded {digest}; the file is damaged or "
            "was replaced: build the index again, or roll back to another release"
        )
    file.seek(0)
    source = _VerifiedPieces(file, pieces, name)
    try:
        return faiss.read_index(faiss.PyCallbackIOReader(source.read, _PIECE))  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise StoreError(f"{name} is not an index that this FAISS can read; build the index again") from error


class _VerifiedPieces:
    """The second pass over a file: pieces as long as in the first, each compared before it is given out."""

    def __init__(self, file: BinaryIO, pieces: list[tuple[int, bytes]], name: str) -> None:
        self._file, self._pieces, self._name = file, iter(pieces), name
        self._piece = memoryview(b"")

    def read(self, size: int) -> bytes:
        if not self._piece and (expected := next(self._pieces, None)):
            piece = _read_fully(self._file, expected[0])
            if _digest(piece) != expected[1]:
                raise StoreError(f"{self._name} changed while it was read; read it again")
            self._piece = memoryview(piece)
        given, self._piece = self._piece[:size], self._piece[size:]
        return bytes(given)


def _read_fully(file: BinaryIO, size: int) -> bytes:
    """Read `size` bytes from a stream that may give fewer at a time (object stores do)."""
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _digest(piece: bytes) -> bytes:
    return blake2b(piece, digest_size=16).digest()
