"""Bytes in, the same bytes out, and nothing else ever reaches FAISS."""

import hashlib
import io
import tempfile

import faiss
import numpy as np
import pyarrow.fs as pafs
import pytest

from schemas.errors import StoreError
from storage.vectors import files as index_files
from storage.vectors.files import read_faiss, write_faiss

ROWS = np.random.default_rng(2).standard_normal((40, 16), dtype=np.float32)


def written():
    index = faiss.IndexFlatIP(16)
    index.add(ROWS)
    file = io.BytesIO()
    return file, write_faiss(index, file)


def test_digest_and_size_are_those_of_the_bytes():
    file, proof = written()
    assert proof.digest == hashlib.blake2b(file.getvalue(), digest_size=16).hexdigest()
    assert proof.size == len(file.getvalue())


@pytest.mark.parametrize("piece", [7, 64, 1 << 20])
def test_round_trip_at_any_piece_size(piece, monkeypatch):
    monkeypatch.setattr(index_files, "_PIECE", piece)
    file, proof = written()
    file.seek(0)
    index = read_faiss(file, proof.digest, proof.size, "index")
    np.testing.assert_array_equal(index.reconstruct_n(0, 40), ROWS)


def test_any_pyarrow_file_system_will_do(tmp_path):
    files = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    index = faiss.IndexFlatIP(16)
    index.add(ROWS)
    with files.open_output_stream("index.faiss") as sink:
        proof = write_faiss(index, sink)
    with files.open_input_file("index.faiss") as source:
        assert read_faiss(source, proof.digest, proof.size, "index").ntotal == 40


def test_a_stream_that_gives_less_than_asked_is_read_to_its_end():
    file, proof = written()

    class Trickle(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 100) if size > 0 else size)

    assert read_faiss(Trickle(file.getvalue()), proof.digest, proof.size, "index").ntotal == 40


def test_every_changed_byte_is_refused():
    file, proof = written()
    good = file.getvalue()
    for at in range(0, len(good), 97):
        bad = bytearray(good)
        bad[at] ^= 1
        with pytest.raises(StoreError, match=r"indexes/r1.*the release recorded .*roll back"):
            read_faiss(io.BytesIO(bad), proof.digest, len(bad), "indexes/r1")


@pytest.mark.parametrize("length", [0, 1, 2500, 10_000])
def test_another_length_is_refused(length):
    file, proof = written()
    with pytest.raises(StoreError, match="the release recorded"):
        read_faiss(io.BytesIO((file.getvalue() + bytes(10_000))[:length]), proof.digest, 10**6, "index")


def test_a_longer_file_than_allowed_is_not_read_on(monkeypatch):
    monkeypatch.setattr(index_files, "_PIECE", 64)
    file, proof = written()
    file.seek(0)
    with pytest.raises(StoreError, match="longer than the 100 bytes"):
        read_faiss(file, proof.digest, 100, "index")
    assert file.tell() <= 192


def test_an_index_that_is_not_held_in_memory_is_read_from_the_temporary_folder(monkeypatch):
    monkeypatch.setattr(index_files, "_IN_MEMORY", 64)
    file, proof = written()
    file.seek(0)
    index = read_faiss(file, proof.digest, proof.size, "index")
    np.testing.assert_array_equal(index.reconstruct_n(0, 40), ROWS)


def test_no_room_for_the_copy_is_reported_as_such(monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda size: Full())
    file, proof = written()
    file.seek(0)
    with pytest.raises(StoreError, match=r"index: cannot be copied to .+ \(No space left on device\); make room"):
        read_faiss(file, proof.digest, proof.size, "index")


def test_bytes_that_are_no_index_are_refused_even_with_their_own_digest():
    rubbish = b"IxFI" + b"\xff" * 500
    digest = hashlib.blake2b(rubbish, digest_size=16).hexdigest()
    with pytest.raises(StoreError, match="not an index that this FAISS can read"):
        read_faiss(io.BytesIO(rubbish), digest, 10**6, "index")


def test_a_full_disk_is_reported_as_such():
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    index = faiss.IndexFlatIP(16)
    with pytest.raises(OSError, match="No space left"):
        write_faiss(index, Full())
