"""The input contract: which Parquet shards are accepted, and what makes a row bad.

`check_shard` decides from the Arrow schema of a shard alone whether the shard can be used at all. `storage.columns`
makes arrays of its columns and gives each bad row its reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

from schemas.errors import BadShardError
from schemas.settings import ColumnNames

FLOATS = (pa.float16(), pa.float32(), pa.float64())
WANTED_EMBEDDING = (
    "fixed_size_list, list or large_list of float16/32/64, arrow.fixed_shape_tensor, or fixed_size_binary of D×4 bytes"
)


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
    if not (is_string(id_type) or pa.types.is_integer(id_type)) or id_type == pa.uint64():
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
        if text and not (is_string(found_type) or pa.types.is_integer(found_type) or pa.types.is_null(found_type)):
            raise BadShardError(f"shard {shard}: column {name!r} has type {found_type}, wanted string.")
        if not text and not (
            pa.types.is_floating(found_type) or pa.types.is_integer(found_type) or pa.types.is_null(found_type)
        ):
            raise BadShardError(f"shard {shard}: column {name!r} has type {found_type}, wanted degrees as float32.")
        present.append(role)
    return ShardSchema(
        dim=embedding_dim(shard, columns.embedding, schema.field(columns.embedding).type),
        id_type=pa.string() if is_string(id_type) else pa.int64(),
        present=tuple(present),
        keep=tuple(pa.field(name, kept_type(shard, name, schema.field(name).type)) for name in columns.keep),
    )


def kept_type(shard: str, name: str, found: pa.DataType) -> pa.DataType:
    """Return the type in which a kept column of type `found` is stored: the nearest one that Delta Lake has.

    Raises:
        BadShardError: Delta Lake has none (unsigned 64-bit integers, times of day, lists, structs …).
    """
    kind = _plain(found)
    if is_string(kind):
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


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_string(kind: pa.DataType) -> bool:
    """Return whether it is one of Arrow's text types."""
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
