"""The manifest: repeats found as a naive reading finds them, and a cache that may be lost without harm."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import BadShardError
from schemas.settings import ColumnNames
from storage.ids import id_checks, id_keys
from storage.layout import SHARD_RECORDS
from storage.location import Location
from storage.manifest import NO_KEY, Manifest, RowKeys, ShardRecord, find_misfits, mark_repeats
from storage.parquet import to_parquet
from storage.shards import find_shards

COLUMNS = ColumnNames()


def record(key: str, rows: int = 1, dim: int | None = 4, id_type: str = "string") -> ShardRecord:
    return ShardRecord(key, f"/{key}.parquet", 1, 1, "1-1", "basis", f"content-{key}", rows, dim, id_type)


def marked(shards: dict[str, Sequence[tuple[int, int]]]) -> dict[str, tuple[list[int], list[int]]]:
    """`mark_repeats` over rows of (key, check): duplicates and collisions by shard."""
    keys = {
        name: RowKeys(np.array([key for key, _ in rows], np.int64), np.array([check for _, check in rows], np.int64))
        for name, rows in shards.items()
    }
    found = mark_repeats({name: record(name, len(rows)) for name, rows in shards.items()}, keys)
    return {name: (one.duplicates, one.collisions) for name, one in found.items()}


row = st.tuples(st.sampled_from([NO_KEY, 0, 1, 2, 3, 2**62]), st.integers(0, 2))


@given(shards=st.dictionaries(st.sampled_from(["a", "b", "B", "a.1", "é~1"]), st.lists(row, max_size=8)))
def test_repeats_are_those_of_a_naive_reading(shards: dict[str, list[tuple[int, int]]]) -> None:
    owners: dict[int, int] = {}
    wanted: dict[str, tuple[list[int], list[int]]] = {}
    for name in sorted(shards):
        duplicates, collisions = wanted.setdefault(name, ([], []))
        for number, (key, check) in enumerate(shards[name]):
            if key == NO_KEY:
                continue
            if key not in owners:
                owners[key] = check
            elif owners[key] == check:
                duplicates.append(number)
            else:
                collisions.append(number)
    assert marked(shards) == wanted


def test_marks_of_an_earlier_run_do_not_stay() -> None:
    keys = {"a": RowKeys(np.array([1]), np.array([1]))}
    stale = replace(record("a"), duplicates=[0], collisions=[0])
    assert mark_repeats({"a": stale}, keys) == {"a": record("a")}
    assert mark_repeats({}, {}) == {}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest(Location(str(tmp_path / "store")))


def write(source: Path, name: str, ids: list[object], subjects: list[str | None] | None = None) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(4 * len(ids), np.float32)), 4)
    columns: dict[str, object] = {"id": pa.array(ids), "embedding": vectors}
    pq.write_table(pa.table(columns | ({"subject": subjects} if subjects else {})), source / f"{name}.parquet")


def count(manifest: Manifest, source: Path, forget=None) -> ShardRecord:
    (shard,) = find_shards(Location(str(source)))
    return manifest.count(shard, COLUMNS, "basis", forget)


def test_counting_keeps_a_key_for_every_known_row(source: Path, manifest: Manifest) -> None:
    write(source, "a", ["x", None, "y", "x"])
    found = count(manifest, source)
    known = pa.array(["x", "y", "x"])
    keys = manifest.row_keys(found)
    assert (found.rows, found.dim, found.id_type, found.forgotten_rows) == (4, 4, "string", 0)
    np.testing.assert_array_equal(keys.keys[[0, 2, 3]], id_keys(known))
    np.testing.assert_array_equal(keys.checks[[0, 2, 3]], id_checks(known))
    assert keys.keys[1] == NO_KEY
    again = mark_repeats({"a": found}, {"a": keys})["a"]
    assert (again.duplicates, again.collisions) == ([3], [])


def test_integers_and_their_digits_are_one_id(source: Path, manifest: Manifest, tmp_path: Path) -> None:
    write(source, "a", [17, None])
    number = count(manifest, source)
    write(source, "a", ["17", None])
    text = count(manifest, source)
    assert (number.id_type, text.id_type) == ("int64", "string")
    np.testing.assert_array_equal(manifest.row_keys(number).keys, manifest.row_keys(text).keys)


def test_forgotten_rows_own_no_id(source: Path, manifest: Manifest) -> None:
    write(source, "a", ["x", "y", None], ["p", "q", "q"])

    def forget(ids: pa.Array, subjects: pa.Array | None) -> tuple[np.ndarray, list[str]]:
        assert subjects is not None
        assert ids.to_pylist() == ["x", "y", None]
        return np.array([name == "q" for name in subjects.to_pylist()]), ["mark-of-q"]

    found = count(manifest, source, forget)
    assert (found.forgotten, found.forgotten_rows) == (["mark-of-q"], 2)
    assert (manifest.row_keys(found).keys == NO_KEY).tolist() == [False, True, True]


def test_a_shard_without_rows_counts_none(source: Path, manifest: Manifest) -> None:
    schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32(), 4))])
    pq.write_table(schema.empty_table(), source / "a.parquet")
    found = count(manifest, source)
    assert found.rows == 0
    assert len(manifest.row_keys(found).keys) == 0


def test_a_shard_rewritten_while_it_is_read_is_bad(source: Path, manifest: Manifest) -> None:
    write(source, "a", ["x"])
    (shard,) = find_shards(Location(str(source)))
    write(source, "a", ["z"])
    with pytest.raises(BadShardError, match=r"shard a: .*was rewritten while it was read; run again"):
        manifest.count(shard, COLUMNS, "basis", None)
    assert manifest.store.files() == []


@pytest.mark.parametrize("change", ["size", "mtime_ns", "change", "uri", "basis"])
def test_whatever_moves_makes_a_shard_be_read_again(source: Path, manifest: Manifest, change: str) -> None:
    write(source, "a", ["x"])
    found = count(manifest, source)
    (shard,) = find_shards(Location(str(source)))
    assert found.describes(shard, "basis")
    if change == "basis":
        assert not found.describes(shard, "other columns")
    else:
        assert not found.describes(
            replace(shard, **{change: "x" if isinstance(getattr(shard, change), str) else 0}), "basis"
        )


def test_what_is_saved_is_loaded_and_keys_without_an_entry_go(source: Path, manifest: Manifest) -> None:
    write(source, "a", ["x", "x"])
    first = replace(count(manifest, source), duplicates=[1], forgotten=["m"], forgotten_rows=3)
    manifest.save({"a": first})
    loaded = Manifest(manifest.store).load()
    assert loaded.records == {"a": first}
    assert sorted(loaded.paths()) == [file.name for file in manifest.store.files()]
    write(source, "a", ["y"])
    second = count(loaded, source)
    loaded.save({"a": second})
    assert loaded.row_keys(first) is None
    assert loaded.row_keys(second) is not None
    assert [file.name for file in manifest.store.files()] == sorted(loaded.paths())


def test_an_unchanged_manifest_is_not_written(source: Path, manifest: Manifest) -> None:
    write(source, "a", ["x"])
    records = {"a": count(manifest, source)}
    manifest.save(records)
    before = (manifest.store / SHARD_RECORDS).entry()
    Manifest(manifest.store).load().save(records)
    assert (manifest.store / SHARD_RECORDS).entry() == before


DAMAGE = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "noise": lambda path: path.write_bytes(os.urandom(200)),
    "another table": lambda path: path.write_bytes(to_parquet(pa.table({"x": [1]}))),
    "no columns": lambda path: path.write_bytes(to_parquet(pa.table({}))),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_manifest_is_an_empty_one(source: Path, manifest: Manifest, damage) -> None:
    write(source, "a", ["x"])
    found = count(manifest, source)
    manifest.save({"a": found})
    for name in manifest.paths():
        damage(Path((manifest.store / name).path))
    assert Manifest(manifest.store).load().records == {}
    assert manifest.row_keys(found) is None


def test_shards_of_another_length_do_not_fit() -> None:
    records = {"a": record("a"), "b": record("b", dim=None), "c": record("c", dim=8)}
    misfits = find_misfits(records, ColumnNames(embedding="face"), 4, None)
    assert list(misfits) == ["c"]
    assert "shard c: column 'face' has 8 numbers a row, the models want 4" in str(misfits["c"])


@pytest.mark.parametrize(
    ("kinds", "store", "wanted"),
    [
        ({"a": (5, "string"), "b": (6, "int64")}, None, ["a"]),
        ({"a": (5, "string"), "b": (6, "int64")}, "string", ["b"]),
        ({"a": (5, "string"), "b": (5, "int64")}, None, ["a"]),  # a tie: the same in every run
        ({"a": (5, "int64")}, "string", ["a"]),
        ({"a": (0, "int64")}, None, []),
        ({}, None, []),
    ],
)
def test_a_new_store_takes_the_ids_that_most_rows_have(kinds, store: str | None, wanted: list[str]) -> None:
    records = {name: record(name, rows, id_type=kind) for name, (rows, kind) in kinds.items()}
    misfits = find_misfits(records, COLUMNS, 4, store)
    assert list(misfits) == wanted
    assert all("a store has one type of id" in str(error) for error in misfits.values())


def test_a_shard_of_another_length_has_no_say_in_the_type_of_ids() -> None:
    records = {"a": record("a", 5), "b": record("b", 500, dim=8, id_type="int64")}
    assert list(find_misfits(records, COLUMNS, 4, None)) == ["b"]


COUNT = """
from schemas.errors import BadShardError
from schemas.settings import ColumnNames
from storage.manifest import Manifest
from storage.location import Location
from storage.shards import find_shards
def read(path):
    [shard] = find_shards(Location(path))
    try:
        return Manifest(Location(path + "-manifest")).count(shard, ColumnNames(), "basis", None).rows
    except BadShardError as error:
        return error
"""


@pytest.mark.parametrize("kind", ["ids", "late ids", "ids in pages", "ids with one beginning"])
def test_counting_a_small_file_costs_no_gigabytes(kind: str, tmp_path: Path, hostile, memory_grown) -> None:
    hostile(tmp_path / "fine" / "a.parquet", "harmless")
    hostile(tmp_path / "bad" / "odd.parquet", kind)
    grown, said = memory_grown(COUNT, tmp_path / "fine", tmp_path / "bad")
    assert said[0] == "8192"
    assert said[1].startswith("shard odd: column 'id' unpacks ")
    assert grown < 400e6, grown


def test_a_value_that_is_no_text_is_named_by_its_row(source: Path, manifest: Manifest) -> None:
    offsets = np.arange(0, 4 * 5001, 4, np.int32)
    content = bytearray(b"Anna" * 5000)
    content[4 * 4321] = 0xFF
    ids = pa.Array.from_buffers(pa.string(), 5000, [None, pa.py_buffer(offsets), pa.py_buffer(bytes(content))])
    write(source, "a", ids)
    with pytest.raises(BadShardError, match=r"row 4321 holds 4 bytes that are no UTF-8") as caught:
        count(manifest, source)
    assert "nna" not in str(caught.value)
