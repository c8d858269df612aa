"""The input contract: which Parquet shards are accepted, and what makes a row bad.

`check_shard` decides from a shard's Arrow schema alone whether the shard can be used at all; `embedding_matrix` turns
any accepted form of the embedding column into one float32 matrix and says, row by row, what is wrong with it. Reading
files is left to `storage.shards`, counting and quarantining to `tasks.reweight`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import BadShardError
from schemas.settings import ColumnNames

FLOATS = (pa.float16(), pa.float32(), pa.float64())
WANTED_EMBEDDING = (
    "fixed_size_list, list or large_list of float16/32/64, arrow.fixed_shape_tensor, or fixed_size_binary of D×4 bytes"
)

# Squared norms are formed in float32: outside this range they underflow or overflow, and so would any cosine.
SMALLEST_SQUARED_NORM = np.float32(1e-36)


class Reason(StrEnum):
    """Why a row is in quarantine. Where several apply, the first in this order is given."""

    NULL_ID = "null_id"
    DUPLICATE_ID = "duplicate_id"
    ID_COLLISION = "id_collision"
    NULL_EMBEDDING = "null_embedding"
    WRONG_LENGTH = "wrong_length"
    NOT_FINITE = "not_finite"
    ZERO_NORM = "zero_norm"
    NORM_OVERFLOW = "norm_overflow"


@dataclass(frozen=True)
class ShardSchema:
    """What a shard promises: `dim` is None where each list has its own length; `present` are the optional columns."""

    dim: int | None
    id_type: pa.DataType
    present: tuple[str, ...]
    keep: tuple[pa.Field, ...]


def check_shard(shard: str, schema: pa.Schema, columns: ColumnNames) -> ShardSchema:
    """Check the Arrow schema of a shard against the contract.

    Raises:
        BadShardError: a needed or kept column is missing, appears twice, or has a type that is not accepted. The
            message names the column, the type found and the type wanted.
    """
    for name in (columns.id, columns.embedding, *columns.keep):
        found = schema.names.count(name)
        if found != 1:
            there = ", ".join(schema.names[:12]) or "no column at all"
            what = "is missing" if found == 0 else f"appears {found} times"
            raise BadShardError(
                f"shard {shard}: column {name!r} {what}; found {there}. Name it under [columns], or with --column."
            )
    id_type = _plain(schema.field(columns.id).type)
    if not (_is_string(id_type) or pa.types.is_integer(id_type)) or id_type == pa.uint64():
        raise BadShardError(f"shard {shard}: column {columns.id!r} has type {id_type}, wanted string or int64.")
    present = []
    for role in ("subject", "pose", "yaw", "pitch", "roll"):
        name = getattr(columns, role)
        if schema.names.count(name) > 1:
            raise BadShardError(f"shard {shard}: column {name!r} appears {schema.names.count(name)} times.")
        if name not in schema.names:
            continue
        found_type = _plain(schema.field(name).type)
        text = role in ("subject", "pose")
        if text and not (_is_string(found_type) or pa.types.is_integer(found_type) or pa.types.is_null(found_type)):
            raise BadShardError(f"shard {shard}: column {name!r} has type {found_type}, wanted string.")
        if not text and not (
            pa.types.is_floating(found_type) or pa.types.is_integer(found_type) or pa.types.is_null(found_type)
        ):
            raise BadShardError(f"shard {shard}: column {name!r} has type {found_type}, wanted degrees as float32.")
        present.append(role)
    return ShardSchema(
        dim=embedding_dim(shard, columns.embedding, schema.field(columns.embedding).type),
        id_type=pa.string() if _is_string(id_type) else pa.int64(),
        present=tuple(present),
        keep=tuple(pa.field(name, kept_type(shard, name, schema.field(name).type)) for name in columns.keep),
    )


def kept_type(shard: str, name: str, found: pa.DataType) -> pa.DataType:
    """Return the type in which a kept column of type `found` is stored: the nearest one that Delta Lake has.

    Raises:
        BadShardError: there is none (unsigned 64-bit integers, times of day, lists, structs …).
    """
    kind = _plain(found)
    if _is_string(kind):
        return pa.string()
    for accepts, stored in _STORED_AS:
        if accepts(kind):
            return kind if stored is None else stored
    raise BadShardError(
        f"shard {shard}: column {name!r} has type {found}, which cannot be kept; wanted text, numbers up to int64, "
        "booleans, dates, timestamps or binary. Cast it, or take it out of columns.keep."
    )


def embedding_dim(shard: str, name: str, found: pa.DataType) -> int | None:
    """Return D where the column's type fixes it, None for lists of free length.

    Raises:
        BadShardError: the type is no accepted form of an embedding.
    """
    kind = found.storage_type if isinstance(found, pa.BaseExtensionType) else found
    if pa.types.is_fixed_size_binary(kind):
        if kind.byte_width % 4 or not kind.byte_width:
            raise BadShardError(
                f"shard {shard}: column {name!r} has {kind.byte_width} bytes a row, wanted D×4 bytes of float32."
            )
        return int(kind.byte_width // 4)
    if pa.types.is_fixed_size_list(kind) and kind.value_type in FLOATS and kind.list_size > 0:
        return int(kind.list_size)
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and kind.value_type in FLOATS:
        return None
    raise BadShardError(f"shard {shard}: column {name!r} has type {found}, wanted {WANTED_EMBEDDING}.")


def embedding_matrix(column: pa.Array, dim: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.object_]]:
    """Turn an accepted embedding column of n rows into a matrix and a verdict a row.

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
            reasons[row] = _verdict(matrix[row])
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


def plain_column(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return a column as plain `kind`: dictionaries decoded, text checked to be UTF-8.

    Raises:
        pa.ArrowInvalid, pa.ArrowNotImplementedError: a value does not fit the type, or the types do not go together.
    """
    array = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if _is_string(array.type):
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
    if not (_is_string(value.type) or pa.types.is_binary(value.type) or pa.types.is_large_binary(value.type)):
        return f"row {first + low} holds a {value.type} that cannot be cast"
    what = "no UTF-8" if _is_string(kind) else f"no {kind}"
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


def _verdict(row: npt.NDArray[np.float32]) -> Reason:
    if not np.isfinite(row).all():
        return Reason.NOT_FINITE
    return Reason.ZERO_NORM if float(np.abs(row).max()) < 1 else Reason.NORM_OVERFLOW


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


# What is stored as what; None keeps the type. Delta Lake has no unsigned integers, half floats or nanoseconds.
_STORED_AS: tuple[tuple[Callable[[pa.DataType], bool], pa.DataType | None], ...] = (
    (lambda kind: kind == pa.uint8(), pa.int16()),
    (lambda kind: kind == pa.uint16(), pa.int32()),
    (lambda kind: kind == pa.uint32(), pa.int64()),
    (lambda kind: kind == pa.float16(), pa.float32()),
    (lambda kind: kind != pa.uint64() and pa.types.is_integer(kind), None),
    (pa.types.is_floating, None),
    (pa.types.is_boolean, None),
    (pa.types.is_date, pa.date32()),
    (lambda kind: pa.types.is_timestamp(kind) and kind.tz is not None, pa.timestamp("us", tz="UTC")),
    (pa.types.is_timestamp, pa.timestamp("us")),
    (lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind), pa.binary()),
    (pa.types.is_fixed_size_binary, pa.binary()),
    (pa.types.is_null, pa.string()),
)
