"""The contract of a shard: which schemas are accepted, and what each refusal names."""

import re

import pyarrow as pa
import pytest

from schemas.errors import BadShardError
from schemas.settings import ColumnNames
from schemas.shards import FLOATS, check_shard, embedding_dim, kept_type

DIM = 6


def check(columns: ColumnNames | None = None, **fields: pa.DataType):
    kinds = {"id": pa.string(), "embedding": pa.list_(pa.float32(), DIM), **fields}
    schema = pa.schema([pa.field(name, kind) for name, kind in kinds.items() if kind is not None])
    return check_shard("part-07", schema, columns or ColumnNames())


@pytest.mark.parametrize(
    ("kind", "dim"),
    [
        *((pa.list_(kind, DIM), DIM) for kind in FLOATS),
        *((make(kind), None) for kind in FLOATS for make in (pa.list_, pa.large_list)),
        (pa.fixed_shape_tensor(pa.float32(), [2, DIM // 2]), DIM),
        (pa.binary(DIM * 4), DIM),
    ],
    ids=str,
)
def test_dimension_follows_from_the_type_where_it_fixes_it(kind: pa.DataType, dim: int | None) -> None:
    assert embedding_dim("part-07", "embedding", kind) == dim


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int32(), DIM),
        pa.list_(pa.float32(), 0),
        pa.list_(pa.list_(pa.float32())),
        pa.binary(),
        pa.binary(10),
        pa.string(),
        pa.float32(),
        pa.null(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.fixed_shape_tensor(pa.int8(), [DIM]),
        pa.struct([("x", pa.float32())]),
    ],
    ids=str,
)
def test_other_types_are_no_embedding(kind: pa.DataType) -> None:
    with pytest.raises(BadShardError, match=r"shard part-07: column 'face' has .*, wanted .*D×4 bytes"):
        embedding_dim("part-07", "face", kind)


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (pa.string(), pa.string()),
        (pa.large_string(), pa.string()),
        (pa.string_view(), pa.string()),
        (pa.dictionary(pa.int16(), pa.large_string()), pa.string()),
        (pa.int8(), pa.int64()),
        (pa.int64(), pa.int64()),
        (pa.uint32(), pa.int64()),
        (pa.dictionary(pa.int8(), pa.int32()), pa.int64()),
    ],
    ids=str,
)
def test_ids_are_text_or_integers(kind: pa.DataType, stored: pa.DataType) -> None:
    assert check(id=kind).id_type == stored


@pytest.mark.parametrize("kind", [pa.uint64(), pa.float64(), pa.bool_(), pa.binary(), pa.null(), pa.date32()], ids=str)
def test_other_types_are_no_id(kind: pa.DataType) -> None:
    with pytest.raises(BadShardError, match=f"part-07: column 'id' has type {re.escape(str(kind))}, wanted string"):
        check(id=kind)


def test_optional_columns_are_found_under_their_names() -> None:
    names = ColumnNames(subject="person", yaw="angle", keep=("camera",))
    found = check(names, person=pa.int32(), angle=pa.float64(), pose=pa.null(), camera=pa.uint16(), other=pa.bool_())
    assert found.present == ("subject", "pose", "yaw")
    assert found.keep == (pa.field("camera", pa.int32()),)
    assert found.dim == DIM


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding": None}, r"column 'embedding' is missing; found id\. Name it under \[columns\]"),
        ({"id": None, "embedding": None}, "column 'id' is missing; found no column at all"),
        ({"subject": pa.float32()}, "column 'subject' has type float, wanted string"),
        ({"pose": pa.bool_()}, "column 'pose' has type bool, wanted string"),
        ({"yaw": pa.string()}, "column 'yaw' has type string, wanted degrees as float32"),
        ({"roll": pa.list_(pa.float32())}, "column 'roll' has type list<.*>, wanted degrees"),
    ],
)
def test_what_is_missing_or_misread_is_named(fields: dict[str, pa.DataType | None], message: str) -> None:
    with pytest.raises(BadShardError, match=f"shard part-07: {message}"):
        check(**fields)


@pytest.mark.parametrize("name", ["id", "embedding", "yaw", "camera"])
def test_a_column_that_appears_twice_is_refused(name: str) -> None:
    kinds = {"id": pa.string(), "embedding": pa.list_(pa.float32(), DIM), "yaw": pa.float32(), "camera": pa.string()}
    schema = pa.schema([*kinds.items(), (name, kinds[name])])
    with pytest.raises(BadShardError, match=f"column '{name}' appears 2 times"):
        check_shard("part-07", schema, ColumnNames(keep=("camera",)))


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (pa.large_string(), pa.string()),
        (pa.dictionary(pa.int32(), pa.string()), pa.string()),
        (pa.null(), pa.string()),
        (pa.int8(), pa.int8()),
        (pa.uint8(), pa.int16()),
        (pa.uint16(), pa.int32()),
        (pa.uint32(), pa.int64()),
        (pa.float16(), pa.float32()),
        (pa.float64(), pa.float64()),
        (pa.bool_(), pa.bool_()),
        (pa.date64(), pa.date32()),
        (pa.timestamp("ns"), pa.timestamp("us")),
        (pa.timestamp("s", tz="Europe/Berlin"), pa.timestamp("us", tz="UTC")),
        (pa.large_binary(), pa.binary()),
        (pa.binary(4), pa.binary()),
    ],
    ids=str,
)
def test_kept_columns_take_the_nearest_type_delta_has(kind: pa.DataType, stored: pa.DataType) -> None:
    assert kept_type("part-07", "note", kind) == stored


@pytest.mark.parametrize(
    "kind",
    [pa.uint64(), pa.time64("us"), pa.list_(pa.int8()), pa.struct([("a", pa.int8())]), pa.duration("s")],
    ids=str,
)
def test_what_delta_lacks_cannot_be_kept(kind: pa.DataType) -> None:
    with pytest.raises(BadShardError, match=r"column 'note' has type .*, which cannot be kept; .*columns\.keep"):
        kept_type("part-07", "note", kind)
