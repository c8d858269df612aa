"""Blocks: what a small file unpacks to is bounded, and odd rows among ordinary ones are still read as they are."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.blocks import read_blocks

READ = """
from schemas.errors import BadShardError
from storage.location import Location
from storage.shards import find_shards, stream_blocks
def read(path):
    [shard] = find_shards(Location(path))
    try:
        return sum(block.num_rows for _, block in stream_blocks(shard, ["id", "embedding", "subject"], 4096))
    except BadShardError as error:
        return error
"""

GROWS = r"unpacks to [\d,]+ bytes in the rows from {} on, one value to {}; at most {} a row are taken on average\. Sh"
HOSTILE_KINDS = {
    "ids": "column 'id' " + GROWS.format("0", "1,000,000", "16,384"),
    "late ids": "column 'id' " + GROWS.format("4,096", "1,000,000", "16,384"),
    "subjects": "column 'subject' " + GROWS.format("0", "1,000,000", "16,384"),
    "ids in pages": r"column 'id' unpacks from [\d,]+ to 2,56\d,\d+,\d+ bytes in row group 0 of 2,560 rows; shorten",
    "ids with one beginning": "column 'id' " + GROWS.format("0", "1,000,00[12]", "16,384"),
    "lists": r"column 'embedding' unpacks from [\d,]+ to 2,560,000,000 bytes in row group 0 of 640 rows; shorten",
    "lists in many row groups": "column 'embedding' " + GROWS.format("0", "4,000,000", "32,768"),
    "null lists of fixed size": "column 'embedding' " + GROWS.format("0", "4,000,000", "32,768"),
}


@pytest.mark.parametrize("kind", HOSTILE_KINDS)
def test_a_small_file_costs_no_gigabytes(kind: str, tmp_path: Path, hostile, memory_grown) -> None:
    """Each unpacks to 2.4 GB at least; unbounded, a block of the ids or lists took 7 GB."""
    hostile(tmp_path / "fine" / "a.parquet", "harmless")
    hostile(tmp_path / "bad" / "odd.parquet", kind)
    grown, said = memory_grown(READ, tmp_path / "fine", tmp_path / "bad")
    assert said[0] == "8192"
    assert re.match(f"shard odd: {HOSTILE_KINDS[kind]}", said[1]), said[1]
    assert grown < 400e6, grown


def odd_text(encoding: str | None) -> tuple[pa.Table, dict[str, object]]:
    words = [f"i{row}" for row in range(3000)]
    words[700] = "y" * 3_000_000
    words[1900] = None
    options = {"use_dictionary": False, "column_encoding": {"id": encoding}} if encoding else {}
    return pa.table({"id": words}), options


ODD: dict[str, Callable[[], tuple[pa.Table, dict[str, object]]]] = {
    "one long text": lambda: odd_text(None),
    "one long text in pages": lambda: odd_text("PLAIN"),
    "one long text after its beginning": lambda: odd_text("DELTA_BYTE_ARRAY"),
    "text of a dictionary": lambda: (odd_text(None)[0].cast(pa.schema([("id", pa.dictionary("int32", "string"))])), {}),
    "one long list": lambda: (pa.table({"id": [[1.0]] * 900 + [[0.5] * 2_000_000, None, []]}), {}),
    "nothing but nulls": lambda: (pa.table({"id": pa.nulls(3000, pa.list_(pa.float32(), 4000))}), {}),
    "long texts in row groups of their own": lambda: (
        pa.table({"id": ["z" * 9_000_000, "a", "z"]}),
        {"row_group_size": 1},
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_a_few_odd_rows_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    table, options = ODD[name]()
    pq.write_table(table, tmp_path / "a.parquet", **options)
    with (tmp_path / "a.parquet").open("rb") as file:
        blocks = list(read_blocks(file, "shard a", ["id"], 1000))
    assert [first for first, _ in blocks] == list(range(0, table.num_rows, 1000))
    assert pa.Table.from_batches([block for _, block in blocks]).to_pylist() == table.to_pylist()


def test_a_well_compressed_shard_is_fine(tmp_path: Path) -> None:
    """Embeddings of one bit a number, one row group."""
    rows, dim = 70_000, 512
    bits = np.random.default_rng(0).integers(0, 2, rows * dim, np.int8).astype(np.float32)
    table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(bits), dim)})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert table.nbytes > 30 * (tmp_path / "a.parquet").stat().st_size
    with (tmp_path / "a.parquet").open("rb") as file:
        assert sum(block.num_rows for _, block in read_blocks(file, "shard a", ["embedding"], 4096)) == rows


@pytest.mark.parametrize(
    "kind", [pa.string_view(), pa.binary_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_text_of_every_kind_is_read_and_measured(tmp_path: Path, kind: pa.DataType) -> None:
    rows = 20_000
    ids = pa.array([f"id-{row}" for row in range(rows)])
    ids = ids.dictionary_encode() if pa.types.is_dictionary(kind) else ids.cast(kind)
    pq.write_table(pa.table({"id": ids}), tmp_path / "a.parquet", row_group_size=7000)
    with (tmp_path / "a.parquet").open("rb") as file:
        blocks = [block for _, block in read_blocks(file, "shard a", ["id"], 4096)]
    assert [block.num_rows for block in blocks] == [4096] * 4 + [rows - 4 * 4096]
    assert blocks[1].column("id").type == pq.read_schema(tmp_path / "a.parquet").field("id").type
