"""Query vectors: embeddings that a person passes in a `.npy`, `.parquet` or `.csv` file.

Nothing that a file says of itself is trusted: its header is parsed under a limit, and what it promises is compared
with its size before memory is asked for.
"""

import math
import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from schemas.errors import BadShardError, SettingsError, first_line
from schemas.features import BLOCK_ROWS
from schemas.files import open_regular
from schemas.shards import embedding_dim
from storage.blocks import open_parquet, read_blocks
from storage.columns import embedding_matrix, plain_column

MAX_NUMBERS = 1 << 28  # 1 GiB of float32 a call
MAX_ID_BYTES = 1 << 28
MAX_CSV_LINE = 1 << 22  # bytes: 65,536 numbers of 60 digits
MAX_NPY_HEADER = 4096  # bytes; numpy itself writes 128 for an array of floats
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_vectors(path: str, dim: int) -> tuple[list[str | int], np.ndarray]:
    """Return names and raw embeddings `[n, D]` of a file.

    - `.npy`: an array `[D]` or `[n, D]` of floats.
    - `.parquet`: a column `embedding`, optionally `id`.
    - `.csv`: D numbers a line after commas, optionally an id before them; a first line whose last field is no number
      holds the names of the columns.

    A row without an id is named by its number.

    Raises:
        SettingsError: no such file, another format, rows that are not finite, zero or of another length than `dim`.
    """
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".npy":
            names, matrix = _from_npy(path)
        elif suffix in (".parquet", ".pq"):
            names, matrix = _from_parquet(path, dim)
        elif suffix == ".csv":
            names, matrix = _from_csv(path, dim)
        else:
            raise SettingsError(f"--vectors {path}: must end in .npy, .parquet or .csv.")
    except FileNotFoundError as error:
        raise SettingsError(f"--vectors {path}: there is no such file.") from error
    except (ValueError, OSError, BadShardError, pa.ArrowException) as error:
        raise SettingsError(f"--vectors {path}: cannot be read ({first_line(error)}).") from error
    check_vectors(f"--vectors {path}", matrix, dim)
    return names, matrix


def check_vectors(shown: str, matrix: np.ndarray, dim: int) -> None:
    """Refuse embeddings `[n, D]` that have no direction, or another D than `dim`, with a SettingsError.

    `shown` is what the message calls them.
    """
    if matrix.ndim != 2 or matrix.shape[1] != dim:
        raise SettingsError(f"{shown}: has {matrix.shape[-1]} numbers a row, the index {dim}.")
    norms = np.linalg.norm(matrix.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms < 1e-18))
    if bad.size:
        raise SettingsError(f"{shown}: row {bad[0]} is zero or not finite, so it has no direction.")


def _from_npy(path: str) -> tuple[list[str | int], np.ndarray]:
    with open_regular(path) as file:
        start = file.read(MAX_NPY_HEADER)
        shape, fortran_order, dtype, offset = npy_header(start)
        count, size = math.prod(shape), os.fstat(file.fileno()).st_size
        wanted = offset + count * dtype.itemsize
        if size != wanted:
            raise ValueError(f"an array of {dtype} {shape} is a file of {wanted:,} bytes, this one has {size:,}")
        _check_size(count)
        file.seek(offset)
        numbers = np.fromfile(file, dtype, count)
    if len(numbers) != count:
        raise ValueError("the file shrank while it was read")
    matrix = _matrix(numbers, shape, fortran_order)
    return list(range(len(matrix))), matrix


def npy_matrix(content: bytes) -> np.ndarray:
    """Return the embeddings, float32 `[n, D]`, of the bytes of a `.npy` file.

    Raises:
        SettingsError: not a `.npy` file, of another array than floats `[D]` or `[n, D]`, or of another length.
    """
    try:
        shape, fortran_order, dtype, offset = npy_header(content[:MAX_NPY_HEADER])
    except ValueError as error:
        raise SettingsError(f"vectors: cannot be read as .npy ({first_line(error)}).") from error
    count = math.prod(shape)
    wanted = offset + count * dtype.itemsize
    if len(content) != wanted:
        raise SettingsError(f"vectors: an array of {dtype} {shape} has {wanted:,} bytes, these are {len(content):,}.")
    return _matrix(np.frombuffer(content, dtype, count, offset), shape, fortran_order)


def _matrix(numbers: np.ndarray, shape: tuple[int, ...], fortran_order: bool) -> np.ndarray:
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused as such
        array = numbers.astype(np.float32).reshape(shape, order="F" if fortran_order else "C")
    return np.ascontiguousarray(np.atleast_2d(array))


def npy_header(start: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Parse the header of a `.npy` file, of which `start` holds the first `MAX_NPY_HEADER` bytes.

    Returns:
        Shape (`[D]` or `[n, D]`, not empty), whether columns come first, type (floats of 16, 32 or 64 bits), and how
        many bytes the header takes.

    Raises:
        ValueError: not such a header, of any other array, or longer than `start`.
    """
    stream = BytesIO(start)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes, odd types, and files of Python 2
            version = np.lib.format.read_magic(stream)
            shape, fortran_order, dtype = _READ_HEADER[version](stream, max_header_size=MAX_NPY_HEADER)
            plain = [type(length) is int and length > 0 for length in shape]
            allowed = dtype.kind == "f" and dtype.itemsize in (2, 4, 8)
    except Exception as error:  # whatever Python's parser raises over hostile text, also MemoryError
        raise ValueError(f"no header of a .npy file ({type(error).__name__})") from error
    if not allowed or len(plain) not in (1, 2) or not all(plain):
        shown = f"{dtype} {shape}"
        raise ValueError(f"array of {shown[:80]}, wanted floats of 16, 32 or 64 bits, [D] or [n, D]")
    return shape, fortran_order, dtype, stream.tell()


def _from_parquet(path: str, dim: int) -> tuple[list[str | int], np.ndarray]:
    with open_regular(path) as file, open_parquet(file) as parquet:
        found, rows = parquet.schema_arrow, parquet.metadata.num_rows
        if found.names.count("embedding") != 1 or found.names.count("id") > 1 or not rows:
            raise ValueError(
                f"columns {', '.join(found.names[:8])}, {rows} rows; wanted one 'embedding', one 'id' at most"
            )
        width = embedding_dim(path, "embedding", found.field("embedding").type)
        if width not in (None, dim):
            raise ValueError(f"{width} numbers a row, the index has {dim}")
        _check_size(rows * dim)
        wanted = [name for name in ("id", "embedding") if name in found.names]
        names: list[str | int] = []
        matrix, text = np.empty((rows, dim), np.float32), 0
        for first, block in read_blocks(file, "file", wanted, BLOCK_ROWS):
            part, reasons = embedding_matrix(block.column("embedding"), dim)
            for row, reason in enumerate(reasons, first):
                if reason is not None:
                    raise ValueError(f"row {row}: {reason}, wanted {dim} finite numbers that are not all zero")
            matrix[first : first + len(part)] = part
            ids = _names(block.column("id")) if "id" in wanted else pa.nulls(len(part))
            text += ids.nbytes
            if text > MAX_ID_BYTES:
                raise ValueError(f"ids of more than {MAX_ID_BYTES:,} bytes in {rows:,} rows; split the file")
            names += [row if name is None else name for row, name in enumerate(ids.to_pylist(), first)]
    return names, matrix


def _from_csv(path: str, dim: int) -> tuple[list[str | int], np.ndarray]:
    with open_regular(path) as file:
        fields = file.read(MAX_CSV_LINE).partition(b"\n")[0].decode().strip("\ufeff\r").split(",")
        size = os.fstat(file.fileno()).st_size
        if len(fields) not in (dim, dim + 1):
            raise ValueError(f"{len(fields)} fields in the first line; wanted {dim} numbers, or an id before them")
        _check_size(size // 2)  # a number takes a digit and a comma at least
        file.seek(0)
        has_id = len(fields) > dim
        numbers = [f"f{number}" for number in range(dim)]
        table = pyarrow.csv.read_csv(
            file,
            pyarrow.csv.ReadOptions(
                column_names=["id", *numbers] if has_id else numbers,
                skip_rows=0 if _is_number(fields[-1]) else 1,
                block_size=max(1 << 23, 2 * MAX_CSV_LINE),
            ),
            pyarrow.csv.ParseOptions(ignore_empty_lines=True),
            pyarrow.csv.ConvertOptions(
                column_types={"id": pa.string()} | dict.fromkeys(numbers, pa.float32()), strings_can_be_null=False
            ),
        )
    if not table.num_rows:
        raise ValueError("no row of numbers")
    matrix = np.empty((table.num_rows, dim), np.float32)
    for number, name in enumerate(numbers):
        matrix[:, number] = table[name].to_numpy()
    names: list[str | int] = list(range(len(matrix)))
    if has_id:
        names = [name or row for row, name in enumerate(table["id"].to_pylist())]
    return names, matrix


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _names(ids: pa.Array) -> pa.Array:
    kind = ids.type.value_type if pa.types.is_dictionary(ids.type) else ids.type
    return plain_column(ids, pa.int64() if pa.types.is_integer(kind) else pa.string())


def _check_size(numbers: int) -> None:
    if numbers > MAX_NUMBERS:
        raise ValueError(f"{numbers:,} numbers, more than the {MAX_NUMBERS:,} of one call; split the file")
