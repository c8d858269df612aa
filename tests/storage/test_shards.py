"""Shards: found in one order, detected when rewritten, and streamed in blocks that never show how a file was cut."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.errors import BadShardError, SettingsError
from storage.location import Location
from storage.shards import content_digest, find_shards, open_shard, read_schema, still_same, stream_blocks

ROWS = 1_000


def write(path: Path, rows: int = ROWS, seed: int = 0, **options: object) -> pa.Table:
    matrix = np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), 4)
    table = pa.table({"id": [f"id-{row}" for row in range(rows)], "embedding": embedding})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return table


def only(source: Path):
    (shard,) = find_shards(Location(str(source)))
    return shard


def test_shards_are_ordered_by_key_wherever_they_are(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.PQ", "day 1/a.parquet", "_log/x.parquet", ".x.parquet", "part.parquet.tmp", "z.csv"):
        write(tmp_path / name, rows=1)
    found = find_shards(Location(str(tmp_path)))
    assert [shard.key.partition("~")[0] for shard in found] == ["a", "b", "day_1_a"]
    assert [shard.uri for shard in found] == [f"{tmp_path}/{name}" for name in ("a.PQ", "b.parquet", "day 1/a.parquet")]
    assert [shard.size for shard in found] == [Path(shard.uri).stat().st_size for shard in found]


def test_one_file_is_a_source_too(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows=3)
    write(tmp_path / "b.parquet", rows=3)
    shard = only(tmp_path / "a.parquet")
    assert shard == find_shards(Location(str(tmp_path)))[0]
    assert read_schema(shard)[1] == 3


def test_a_source_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere: does not exist"):
        find_shards(Location(str(tmp_path / "nowhere")))
    with pytest.raises(SettingsError, match=r"holds no \.parquet file"):
        find_shards(Location(str(tmp_path)))


def test_two_files_of_one_key_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows=1)
    write(tmp_path / "a.pq", rows=1)
    with pytest.raises(SettingsError, match=r"'a\.pq' and '.*a\.parquet' share the name 'a'; rename one"):
        find_shards(Location(str(tmp_path)))


def test_a_rewrite_is_noticed_and_the_digest_follows_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write(file, seed=1, compression="none", use_dictionary=False)
    os.utime(file, ns=(1, 1))
    before = only(tmp_path)
    digest = content_digest(before)
    assert still_same(before)
    write(file, seed=2, compression="none", use_dictionary=False)
    os.utime(file, ns=(1, 1))
    after = only(tmp_path)
    assert (after.size, after.mtime_ns) == (before.size, before.mtime_ns)
    assert not still_same(before)
    assert content_digest(after) != digest
    write(file, seed=1, compression="none", use_dictionary=False)
    assert content_digest(only(tmp_path)) == digest
    file.unlink()
    assert not still_same(after)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(st.integers(0, 60), max_size=6),
    page=st.sampled_from([64, 1024, 1 << 20]),
    rows=st.integers(1, 130),
    version=st.sampled_from(["1.0", "2.0"]),
)
def test_blocks_hold_consecutive_rows_whatever_the_layout(
    tmp_path: Path, groups: list[int], page: int, rows: int, version: str
) -> None:
    total = sum(groups)
    table = write(tmp_path / "plain.parquet", rows=total)
    with pq.ParquetWriter(
        tmp_path / "a.parquet", table.schema, data_page_size=page, data_page_version=version
    ) as writer:
        for start, length in zip(np.cumsum([0, *groups]), groups, strict=False):
            writer.write_table(table.slice(int(start), length), row_group_size=max(1, length))
    blocks = list(stream_blocks(only(tmp_path / "a.parquet"), ["embedding", "id"], rows))
    assert [first for first, _ in blocks] == list(range(0, total, rows))
    assert all(block.num_rows == rows for _, block in blocks[:-1])
    read = pa.Table.from_batches([block for _, block in blocks], table.select(["embedding", "id"]).schema)
    assert read.equals(table.select(["embedding", "id"]))


def encrypted(path: Path) -> None:
    class Keys(pe.KmsClient):
        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
            return key_bytes

        def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
            return wrapped_key

    factory = pe.CryptoFactory(lambda configuration: Keys())
    properties = factory.file_encryption_properties(
        pe.KmsConnectionConfig(), pe.EncryptionConfiguration(footer_key="k", uniform_encryption=True)
    )
    table = pa.table({"id": ["a"]})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


def truncated(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-100])


SPOILED = {
    "empty": lambda path: path.write_bytes(b""),
    "no Parquet": lambda path: path.write_text("id,embedding\n" * 100),
    "truncated": truncated,
    "encrypted": encrypted,
    "a footer of a wrong length": lambda path: path.write_bytes(b"PAR1" + os.urandom(500) + b"\xff\xff\xff\x7fPAR1"),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_file_that_is_no_parquet_is_a_bad_shard(tmp_path: Path, spoil) -> None:
    spoil(tmp_path / "a.parquet")
    shard = only(tmp_path)
    for read in (lambda: read_schema(shard), lambda: list(stream_blocks(shard, ["id"], 10))):
        with pytest.raises(BadShardError, match=r"shard a: .*a\.parquet cannot be read as Parquet \(.+\); write it"):
            read()


def test_a_flipped_bit_is_found_where_the_writer_left_checksums(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = write(file, compression="none", use_dictionary=False, write_page_checksum=True, row_group_size=100)
    content = bytearray(file.read_bytes())
    at = content.find(np.float32(table["embedding"][950].as_py()).tobytes())
    content[at] ^= 1
    file.write_bytes(content)
    blocks = stream_blocks(only(tmp_path), ["embedding"], 100)
    assert next(blocks)[1].num_rows == 100
    with pytest.raises(BadShardError, match=r"shard a: .*cannot be read as Parquet"):
        list(blocks)


def test_a_shard_that_vanished_says_so(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    shard = only(tmp_path)
    (tmp_path / "a.parquet").unlink()
    for read in (content_digest, read_schema):
        with pytest.raises(BadShardError, match=r"shard a: .*a\.parquet cannot be found; it vanished"):
            read(shard)


def test_what_a_reader_refuses_by_itself_stays_its_own_refusal(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    shard = only(tmp_path)

    def refuse() -> None:
        with open_shard(shard):
            raise BadShardError("shard a: column 'face' is missing")

    with pytest.raises(BadShardError, match=r"^shard a: column 'face' is missing$"):
        refuse()
