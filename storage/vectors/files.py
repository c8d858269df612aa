"""FAISS indexes as verified bytes: written to any stream with a digest, read back only as they were written.

FAISS trusts what it reads, so no byte reaches it before the digest of all is known to be right. What an index is for is
left to `storage.vectors.index`.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, BinaryIO

import faiss

from schemas.errors import StoreError

_PIECE = 8 * 2**20
_IN_MEMORY = 256 * 2**20


@dataclass(frozen=True)
class Written:
    """What was written: the BLAKE2b-128 of the bytes as 32 hexadecimal digits, and their number."""

    digest: str
    size: int


def write_faiss(index: Any, file: BinaryIO) -> Written:
    """Stream a `faiss.Index` into `file` (any object with `write`), hashing on the way, in a thread of its own."""
    digest, size = blake2b(digest_size=16), 0
    with ThreadPoolExecutor(1) as hashing:
        hashed = hashing.submit(digest.update, b"")

        def take(piece: bytes) -> int:
            nonlocal size, hashed
            hashed.result()  # at most one piece waits
            hashed = hashing.submit(digest.update, piece)
            file.write(piece)
            size += len(piece)
            return len(piece)

        faiss.write_index(index, faiss.PyCallbackIOWriter(take, _PIECE))  # type: ignore[attr-defined]
        hashed.result()
    return Written(digest.hexdigest(), size)


def read_faiss(file: BinaryIO, digest: str, max_bytes: int, name: str) -> Any:
    """Read a `faiss.Index` once all bytes of its file are known to be those that were written.

    FAISS reads from a private copy, so a file that changes meanwhile cannot reach it. A copy of more than 256 MiB is in
    the temporary folder (TMPDIR).

    Args:
        file: at its start.
        digest: `Written.digest`, as recorded in the release.
        max_bytes: what may be read; a longer file is refused without reading on.
        name: how messages call the file.

    Raises:
        StoreError: too long, another digest, no room for the copy, or not an index of this FAISS.
    """
    found, size = blake2b(digest_size=16), 0
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as copy:
        while piece := file.read(_PIECE):
            size += len(piece)
            if size > max_bytes:
                raise StoreError(f"{name} is longer than the {max_bytes:,} bytes that may be read; raise the limit")
            found.update(piece)
            try:
                copy.write(piece)
            except OSError as error:
                raise StoreError(
                    f"{name}: cannot be copied to {tempfile.gettempdir()} ({error.strerror}); make room there, or set "
                    "TMPDIR to another folder"
                ) from error
        if found.hexdigest() != digest:
            raise StoreError(
                f"{name}: its bytes have digest {found.hexdigest()}, the release recorded {digest}; the file is "
                "damaged or was replaced: build the index again, or roll back to another release"
            )
        copy.seek(0)
        try:
            return faiss.read_index(faiss.PyCallbackIOReader(copy.read, _PIECE))  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise StoreError(f"{name} is not an index that this FAISS can read; build the index again") from error
