"""Files of query vectors: the numbers that were written, and every hostile file refused in one sentence."""

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import SettingsError
from storage.query_vectors import MAX_NPY_HEADER, npy_header, read_vectors

D = 32


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("rows", [None, 1, 7])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_arrays_of_floats_are_read_as_written(tmp_path: Path, kind: str, order: str, rows: int | None, version) -> None:
    shape = (D,) if rows is None else (rows, D)
    written = np.random.default_rng(0).standard_normal(shape).astype(kind, order=order)
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, written, version)
    names, matrix = read_vectors(str(tmp_path / "x.npy"), D)
    assert names == list(range(rows or 1))
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, np.atleast_2d(written).astype(np.float32))


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("trapped"),))


def header_of(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def array(value: object) -> Callable[[Path], None]:
    return lambda path: np.save(path, value, allow_pickle=True)


def content(value: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(value)


def table(**columns: object) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def bomb(path: Path) -> None:
    """A few kilobytes of Parquet that unfold to more rows than one call takes."""
    rows = 9_000_000
    column = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), ["x"])
    embedding = pa.ListArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows + 1), pa.array([], pa.float32()))
    pq.write_table(pa.table({"id": column, "embedding": embedding}), path, compression="zstd")


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header_of("(1,)") + bytes(4))


HOSTILE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": (".npy", lambda path: None, "there is no such file"),
    "another format": (".txt", content(b"1,2"), r"must end in \.npy, \.parquet or \.csv"),
    "short line": (".csv", content(b"1,2"), f"2 fields in the first line; wanted {D} numbers"),
    "no line": (".csv", content(b""), "1 fields in the first line"),
    "names alone": (".csv", content(b",".join([b"e"] * D)), "cannot be read"),
    "a short line below": (".csv", content(b",".join([b"1"] * D) + b"\n1,2\n"), "cannot be read"),
    "a word among numbers": (".csv", content(b",".join([b"1"] * D) + b"\nx" + b",1" * (D - 1)), "cannot be read"),
    "an empty field": (".csv", content(b",".join([b"1"] * D) + b"\n" + b",1" * (D - 1)), "row 1 is zero or not finite"),
    "no UTF-8": (".csv", content(b"\xff" + b",1" * D), "cannot be read"),
    "an endless line": (".csv", content(b"1" * (1 << 23)), "1 fields in the first line"),
    "named pipe of text": (".csv", os.mkfifo, "is a named pipe, not a regular file"),
    "empty": (".npy", content(b""), "cannot be read"),
    "no array": (".npy", content(b"hello" * 99), "cannot be read"),
    "pickle": (".npy", content(pickle.dumps(Trap())), "cannot be read"),
    "array of objects": (".npy", array(np.array([Trap()], object)), "cannot be read"),
    "archive": (".npy", zipped, "cannot be read"),
    "header that promises a terabyte": (".npy", content(header_of("(10000000000, 32)") + bytes(64)), "cannot be read"),
    "header of a negative shape": (".npy", content(header_of("(-1, 32)") + bytes(128)), "wanted floats"),
    "header of an endless shape": (".npy", content(header_of(f"({'9' * 60}, 32)") + bytes(128)), "is a file of"),
    "header of a shape of truths": (".npy", content(header_of("(True, 32)") + bytes(128)), "wanted floats"),
    "header of many brackets": (".npy", content(header_of("(" * 3000)), "no header of a .npy file"),
    "header of many signs": (".npy", content(header_of("(" + "-" * 3000 + "1, 32)")), "no header of a .npy file"),
    "header of a broken token": (".npy", content(header_of("(2L, " + "'" * 3)), "no header of a .npy file"),
    "header beyond the limit": (".npy", content(header_of("(1, 32)" + " " * 5000) + bytes(128)), "no header"),
    "header of version 9": (".npy", content(b"\x93NUMPY\x09\x00" + header_of("(1, 32)")[8:]), "no header"),
    "header of nonsense": (".npy", content(header_of("__import__('os')")), "cannot be read"),
    "truncated": (".npy", content(header_of("(2, 32)") + bytes(200)), "cannot be read"),
    "more than it says": (".npy", content(header_of("(2, 32)") + bytes(300)), "file of 384 bytes, this one has 428"),
    "integers": (".npy", array(np.ones((1, D), np.int64)), "wanted floats of 16, 32 or 64 bits"),
    "long doubles": (".npy", array(np.ones((1, D), np.longdouble)), "wanted floats of 16, 32 or 64 bits"),
    "named pipe": (".npy", os.mkfifo, "is a named pipe, not a regular file"),
    "named pipe of Parquet": (".parquet", os.mkfifo, "is a named pipe, not a regular file"),
    "device": (".npy", lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "folder": (".npy", Path.mkdir, "is a folder, not a regular file"),
    "text": (".npy", array(np.array(["a", "b"])), "wanted floats"),
    "complex numbers": (".npy", array(np.ones((1, D), complex)), "wanted floats"),
    "three dimensions": (".npy", array(np.ones((2, 2, D))), "wanted floats"),
    "no row": (".npy", array(np.ones((0, D))), "wanted floats"),
    "another length": (".npy", array(np.ones((2, D + 1), np.float32)), f"has {D + 1} numbers a row, the index {D}"),
    "NaN": (".npy", array(np.full((1, D), np.nan)), "row 0 is zero or not finite"),
    "zero": (".npy", array(np.stack([np.ones(D), np.zeros(D)])), "row 1 is zero or not finite"),
    "beyond float32": (".npy", array(np.full((1, D), 1e300)), "row 0 is zero or not finite"),
    "no Parquet": (".parquet", content(b"PAR1" + bytes(50) + b"PAR1"), "cannot be read"),
    "no embedding": (".parquet", table(vector=[[1.0]]), "wanted one 'embedding'"),
    "embedding of text": (".parquet", table(embedding=["x"]), "has type string"),
    "short row": (".parquet", table(embedding=[[1.0] * D, [1.0]]), "row 1: wrong_length"),
    "null row": (".parquet", table(embedding=[[1.0] * D, None]), "row 1: null_embedding"),
    "NaN row": (".parquet", table(embedding=[[float("nan")] * D]), "row 0: not_finite"),
    "ids that are no ids": (".parquet", table(embedding=[[1.0] * D], id=[{"a": 1}]), "cannot be read"),
    "bomb": (".parquet", bomb, "288,000,000 numbers, more than the 268,435,456 of one call; split the file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    suffix, make, says = HOSTILE[name]
    path = tmp_path / f"queries{suffix}"
    make(path)
    with pytest.raises(SettingsError, match=says) as caught:
        read_vectors(str(path), D)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trapped").exists()


def test_fuzzed_headers_raise_nothing_but_value_errors() -> None:
    """4,000 mutated headers, seed 0. A header that is accepted promises floats of one or two dimensions."""
    random_ = random.Random(0)
    accepted = 0
    for _ in range(4000):
        header = bytearray(random_.choice(HEADERS))
        for mutate in random_.choices([flip, insert, overwrite, cut], k=random_.randint(1, 6)):
            mutate(header, random_)
        if random_.random() < 0.7:  # make the length that it states true again
            header[8:10] = ((len(header) - 10) & 0xFFFF).to_bytes(2, "little")
        try:
            shape, _, dtype, offset = npy_header(bytes(header[:MAX_NPY_HEADER]))
        except ValueError:
            continue
        accepted += 1
        assert dtype.kind == "f"
        assert len(shape) in (1, 2)
        assert min(shape) > 0
        assert offset <= len(header)
    assert 0 < accepted < 2000


HEADERS = [
    header_of("(7, 32)"),
    header_of("(32,)", ">f8"),
    header_of("(7L, 32L)", "<f2"),
    b"\x93NUMPY\x02\x00" + header_of("(7, 32)")[8:10] + bytes(2) + header_of("(7, 32)")[10:],
]
TOKENS = [
    *"()[{}-~'\"#,:*\\\0\n\té٣", "\\x", "'" * 3, "0x", "1e999", "1j", "9" * 30, "9" * 5000, "None", "True", "...",
    "not ", "b''", "f'{0}'", "lambda:0", "-" * 1000, "(" * 1000, "{1:" * 300, "<U9", "|O", "M8[ns]", "V16", "f16",
    "(2,)f4", "[('a','f4')]", "descr", "shape", "fortran_order",
]  # fmt: skip


def flip(header: bytearray, random_: random.Random) -> None:
    header[random_.randrange(len(header))] ^= 1 << random_.randrange(8)


def insert(header: bytearray, random_: random.Random) -> None:
    at = random_.randrange(10, len(header))
    header[at:at] = random_.choice(TOKENS).encode()


def overwrite(header: bytearray, random_: random.Random) -> None:
    at, token = random_.randrange(10, len(header)), random_.choice(TOKENS).encode()
    header[at : at + len(token)] = token


def cut(header: bytearray, random_: random.Random) -> None:
    at = random_.randrange(len(header))
    del header[at : at + random_.randint(1, 12)]
    header += b" " * (16 - len(header))


READ = """
from schemas.errors import SettingsError
from storage.query_vectors import read_vectors
def read(path):
    try:
        return len(read_vectors(path, 32)[0])
    except SettingsError as error:
        return error
"""


@pytest.mark.parametrize("kind", ["ids", "late ids", "ids with one beginning", "lists", "lists in many row groups"])
def test_a_small_file_costs_no_gigabytes(kind: str, tmp_path: Path, hostile, memory_grown) -> None:
    fine, odd = tmp_path / "fine.parquet", tmp_path / "odd.parquet"
    hostile(fine, "harmless")
    hostile(odd, kind)
    grown, said = memory_grown(READ, fine, odd)
    assert said[0] == "8192"
    column = "embedding" if kind.startswith("lists") else "id"
    assert said[1].startswith(f"--vectors {odd}: cannot be read (file: column '{column}' unpacks ")
    assert said[1].endswith(").")
    assert grown < 400e6, grown
