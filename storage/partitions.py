"""Partition columns: columns that are not in a file, because all of its rows have the same value.

Hive folders (`pose=frontal/…`, as Spark, DuckDB, polars and pyarrow write them) give the value in the path; a Delta
table gives it in its log (`storage.source_table`). Reading such a column is `storage.shards`.
"""

import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from schemas.features import digest_of, printable
from schemas.settings import ColumnNames

NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
# As float64 it is the same number: no more digits than those have. Leading zeros mean a name.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_ANGLE = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]*)?([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Partition:
    """The value that a column has in all rows of a file."""

    name: str
    value: pa.Scalar

    def column(self, rows: int) -> pa.Array:
        """Return the column of `rows` rows."""
        return pa.repeat(self.value, rows)


Partitions = tuple[Partition, ...]


def partition_digest(partitions: Partitions) -> str:
    """Return the digest of names, types and values; empty where there is none. A null counts as a missing column."""
    parts = [f"{one.name}\0{one.value.type}\0{one.value}".encode() for one in partitions if one.value.is_valid]
    return digest_of(*parts) if parts else ""


def hive_partitions(names: Sequence[str], columns: ColumnNames) -> list[Partitions]:
    """Return, for each path, the partitions that its folders give and that the settings name.

    Values and names are percent-decoded. An empty value and `__HIVE_DEFAULT_PARTITION__` are null. `subject` and `pose`
    stay text; an angle is a number where it reads as one. The id and kept columns are of one type throughout: int64
    where every value is written as an integer without leading zeros, else float64 where every value is a number, else
    text. Numbers have no leading zeros there: `007` is text.

    Args:
        names: paths of the files, relative to the source.
        columns: names of the columns; partitions of other names are ignored.
    """
    values = [_values(name, {columns.id, columns.embedding, *_others(columns)}) for name in names]
    found: dict[str, set[str]] = {}
    for of_file in values:
        for name, value in of_file.items():
            found.setdefault(name, set()).update([] if value is None else [value])
    kinds = {name: _common_type(texts) for name, texts in found.items()}
    texts, angles = {columns.subject, columns.pose}, {columns.yaw, columns.pitch, columns.roll}

    def kind(name: str, value: str | None) -> pa.DataType:
        if name in texts:
            return pa.string()
        if name in angles:
            return pa.float64() if value is None or _ANGLE.fullmatch(value) else pa.string()
        return kinds[name]

    return [
        tuple(Partition(name, _scalar(value, kind(name, value))) for name, value in sorted(of_file.items()))
        for of_file in values
    ]


def _others(columns: ColumnNames) -> set[str]:
    return {columns.subject, columns.pose, columns.yaw, columns.pitch, columns.roll, *columns.keep}


def _values(path: str, wanted: set[str]) -> Mapping[str, str | None]:
    values: dict[str, str | None] = {}
    for folder in path.split("/")[:-1]:
        name, equals, value = (_decoded(part) for part in folder.partition("="))
        if equals and name in wanted:
            values[name] = None if value in ("", NULL) else value
    return values


def _decoded(text: str) -> str:
    """Undo percent-encoding; what is not UTF-8 then was not encoded."""
    try:
        return printable(urllib.parse.unquote(text, errors="strict"))
    except UnicodeDecodeError:
        return printable(text)


def _common_type(texts: set[str]) -> pa.DataType:
    if not texts:
        return pa.null()
    if all(_INTEGER.fullmatch(text) for text in texts):
        return pa.int64()
    return pa.float64() if all(_NUMBER.fullmatch(text) for text in texts) else pa.string()


def _scalar(value: str | None, kind: pa.DataType) -> pa.Scalar:
    if value is None or pa.types.is_null(kind):
        return pa.scalar(None, kind)
    python = {pa.int64(): int, pa.float64(): float}.get(kind, str)
    return pa.scalar(python(value), kind)
