"""Columns of a shard as arrays: embeddings as one matrix, text and numbers as plain columns, angles in degrees.

Which columns a shard must have, and in which types, is `schemas.shards`.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import BadShardError
from schemas.shards import Reason, is_string

# Squared norms are formed in float32: outside this range they underflow or overflow, and so would any cosine.
SMALLEST_SQUARED_NORM = np.float32(1e-36)


def embedding_matrix(column: pa.Array, dim: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.object_]]:
    """Return an accepted embedding column of n rows as a matrix, and what is wrong with each row.

    Args:
        column: an array whose type `embedding_dim` accepts.
        dim: D, the length wanted of every row.

    Returns:
        (matrix, reasons): float32 `[n, D]`, without a copy where the column allows it, rows that have a reason hold
        arbitrary values; and an object array `[n]` of `Reason | None`. Float64 values beyond float32 become infinite
        and are `NOT_FINITE`; a norm below 1e-18 is `ZERO_NORM`, one above about 1.8e19 `NORM_OVERFLOW`.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    n = len(column)
    reasons = np.full(n, None, dtype=object)
    if column.null_count:
        reasons[column.is_null().to_numpy(zero_copy_only=False)] = Reason.NULL_EMBEDDING
    kind = column.type
    if pa.types.is_fixed_size_binary(kind):
        found = kind.byte_width // 4
        buffer = column.buffers()[1]
        flat = (
            np.frombuffer(buffer, dtype="<f4", count=n * found, offset=column.offset * kind.byte_width) if n else None
        )
        matrix = np.zeros((0, found), np.float32) if flat is None else flat.reshape(n, found)
    elif pa.types.is_fixed_size_list(kind):
        found = kind.list_size
        matrix = _floats(column.values.slice(column.offset * found, n * found)).reshape(n, found)
    else:
        found = dim
        matrix = _from_lists(column, dim, reasons)
    if found != dim:
        reasons[reasons == None] = Reason.WRONG_LENGTH  # noqa: E711 - elementwise
        return np.zeros((n, dim), np.float32), reasons
    with np.errstate(over="ignore", invalid="ignore"):
        squared = np.einsum("ij,ij->i", matrix, matrix)
    for row in np.flatnonzero(~(squared >= SMALLEST_SQUARED_NORM) | ~np.isfinite(squared)):
        if reasons[row] is None:
            reasons[row] = _reason(matrix[row])
    return matrix, reasons


def fitted_column(shard: str, name: str, column: pa.Array, kind: pa.DataType, first: int) -> pa.Array:
    """Return a column as plain `kind`, as `plain_column` does; `first` is the number of its first row.

    Raises:
        BadShardError: a value does not fit. The message names the column, the row and what kind of value it is, never
            the value: it may be the name of a person.
    """
    try:
        return plain_column(column, kind)
    except (pa.ArrowException, UnicodeError) as error:
        raise BadShardError(
            f"shard {shard}: column {name!r} is {column.type} and does not fit the {kind} of the store "
            f"({_misfit(column, kind, first)}); cast it in the source."
        ) from error


def known_subjects(subjects: pa.Array) -> tuple[pa.Array, int]:
    """Return text with blank values (empty, or white space alone) made null, and how many those were.

    A blank name is a missing one: read as a name, all such rows would be one person.
    """
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(subjects), ""), False)
    count = int(pc.sum(blank).as_py() or 0)
    return (pc.if_else(blank, pa.scalar(None, subjects.type), subjects) if count else subjects), count


def plain_column(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return a column as plain `kind`: dictionaries decoded, text checked to be UTF-8.

    Raises:
        pa.ArrowInvalid, pa.ArrowNotImplementedError: a value does not fit the type, or the types do not go together.
    """
    array = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if is_string(array.type):
        array.validate(full=True)
    return array.cast(kind)


def angle_column(column: pa.Array) -> tuple[pa.Array, int]:
    """Return degrees as float32 with values outside [−180, 180] or not finite made null, and how many those were."""
    array = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    array = array.cast(pa.float32(), safe=False)
    bad = pc.fill_null(pc.invert(pc.less_equal(pc.abs(array), 180.0)), False)
    bad = pc.or_(bad, pc.fill_null(pc.is_nan(array), False))
    count = int(pc.sum(bad).as_py() or 0)
    return (pc.if_else(bad, pa.scalar(None, pa.float32()), array) if count else array), count


def _misfit(column: pa.Array, kind: pa.DataType, first: int) -> str:
    low, high = 0, len(column)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if not _fits(column.slice(low, middle - low), kind) else (middle, high)
    if not _fits(column.slice(0, 0), kind):
        return "no value of that type can be cast"
    value = column.slice(low, 1)
    value = value.dictionary_decode() if pa.types.is_dictionary(value.type) else value
    if not (is_string(value.type) or pa.types.is_binary(value.type) or pa.types.is_large_binary(value.type)):
        return f"row {first + low} holds a {value.type} that cannot be cast"
    what = "no UTF-8" if is_string(kind) else f"no {kind}"
    return f"row {first + low} holds {pc.binary_length(value)[0].as_py():,} bytes that are {what}"


def _fits(column: pa.Array, kind: pa.DataType) -> bool:
    try:
        plain_column(column, kind)
    except (pa.ArrowException, UnicodeError):
        return False
    return True


def _from_lists(column: pa.Array, dim: int, reasons: npt.NDArray[np.object_]) -> npt.NDArray[np.float32]:
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    wrong = (lengths != dim) & (reasons == None)  # noqa: E711 - elementwise
    reasons[wrong] = Reason.WRONG_LENGTH
    usable = lengths == dim
    values = _floats(pc.list_flatten(column.filter(pa.array(usable)) if not usable.all() else column))
    if usable.all():
        return values.reshape(len(column), dim)
    matrix = np.zeros((len(column), dim), np.float32)
    matrix[usable] = values.reshape(-1, dim)
    return matrix


def _floats(values: pa.Array) -> npt.NDArray[np.float32]:
    if values.null_count:
        values = pc.fill_null(values.cast(pa.float32()), float("nan"))
    with np.errstate(over="ignore"):
        return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float32)


def _reason(row: npt.NDArray[np.float32]) -> Reason:
    if not np.isfinite(row).all():
        return Reason.NOT_FINITE
    return Reason.ZERO_NORM if float(np.abs(row).max()) < 1 else Reason.NORM_OVERFLOW
