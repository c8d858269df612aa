"""Small Parquet files as bytes: equal tables make equal bytes, and no changed byte is taken for data."""

import pyarrow as pa
import pytest

from storage.parquet import from_parquet, to_parquet

TABLE = pa.table(
    {
        "key": pa.array([1, -(2**63), None], pa.int64()),
        "name": ["a", None, "😀"],
        "rows": pa.array([[1, 2], [], None], pa.list_(pa.int64())),
    }
)


def test_a_table_comes_back_from_its_bytes_and_equal_ones_make_equal_bytes() -> None:
    assert from_parquet(to_parquet(TABLE)).equals(TABLE)
    assert to_parquet(TABLE) == to_parquet(pa.Table.from_pylist(TABLE.to_pylist(), schema=TABLE.schema))
    assert to_parquet(TABLE) == to_parquet(pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)]))
    empty = TABLE.slice(0, 0)
    assert from_parquet(to_parquet(empty)).equals(empty)


def test_metadata_of_the_schema_is_kept() -> None:
    table = TABLE.replace_schema_metadata({b"frontalis": b"kept"})
    assert from_parquet(to_parquet(table)).schema.metadata == {b"frontalis": b"kept"}


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"x" * 100, to_parquet(TABLE)[:-1]])
def test_bytes_that_are_no_parquet_are_refused(content: bytes) -> None:
    with pytest.raises((pa.ArrowException, OSError)):
        from_parquet(content)


def test_no_flipped_bit_gives_other_data() -> None:
    content = to_parquet(TABLE)
    wrong = []
    for at in range(len(content)):
        spoiled = content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]
        try:
            found = from_parquet(spoiled)
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            continue
        if found.schema.names == TABLE.schema.names and found.cast(TABLE.schema).to_pylist() != TABLE.to_pylist():
            wrong.append(at)
    assert wrong == []
