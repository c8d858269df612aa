"""Tables: one atomic commit, a second writer on the same base refused, and every old version readable."""

import json
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from schemas.errors import StoreBusyError, StoreError
from schemas.features import VECTOR
from storage.features import vector_column
from storage.location import Location
from storage.tables import FileTable, LiveFile, Snapshot

SCHEMA = pa.schema([("mode", pa.string()), ("shard", pa.string()), ("id", pa.string()), ("front", VECTOR)])
MATRIX = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture
def table(tmp_path: Path) -> FileTable:
    return FileTable(Location(str(tmp_path / "table")), ("mode", "shard"))


def write(table: FileTable, name: str, shard: str = "a", **more: object) -> LiveFile:
    place = table.place / f"mode=raw/shard={shard}/{name}.parquet"
    content = pa.table({"id": [f"{name}-{row}" for row in range(4)], "front": vector_column(MATRIX), **more})
    with place.writing() as file:
        pq.write_table(content, file, store_schema=False)
    path = place.path.removeprefix(f"{table.place.path}/")
    return LiveFile(path, place.size(), 4, {"mode": "raw", "shard": shard})


def ids(table: FileTable, **options: object) -> list[str]:
    return sorted(pl.scan_delta(table.place.uri, **options).collect()["id"].to_list())


def test_a_table_that_is_not_there_has_no_files(table: FileTable) -> None:
    assert table.snapshot() == Snapshot(-1, {})
    assert table.schema() is None
    with pytest.raises(StoreError, match="has no version 3; it was vacuumed, or the table is gone"):
        table.snapshot(3)


def test_files_are_added_and_removed_in_one_commit(table: FileTable) -> None:
    a, b, c = (write(table, name) for name in "abc")
    first = table.commit(table.snapshot(), SCHEMA, [a, b], [])
    assert first.files == {a.path: a, b.path: b}
    second = table.commit(first, SCHEMA, [c], [a])
    assert second.files == {b.path: b, c.path: c}
    assert second.version == first.version + 1
    assert table.snapshot() == second
    assert table.schema() == SCHEMA


def test_nothing_to_do_is_no_commit_but_makes_the_table(table: FileTable) -> None:
    first = table.commit(table.snapshot(), SCHEMA, [], [])
    assert first.version >= 0
    assert table.commit(first, SCHEMA, [], []) == first == table.snapshot()


def test_old_versions_stay_as_they_were(table: FileTable) -> None:
    snapshots = [table.snapshot()]
    live: list[LiveFile] = []
    for name in "abcde":
        added = [write(table, name)]
        snapshots.append(table.commit(snapshots[-1], SCHEMA, added, live))
        live = added
    for snapshot in snapshots[1:]:
        assert table.snapshot(snapshot.version) == snapshot
    assert ids(table, version=snapshots[2].version) == [f"b-{row}" for row in range(4)]
    with pytest.raises(StoreError, match="at version 99 cannot be read"):
        table.snapshot(99)


def test_others_read_the_table_by_partition(table: FileTable) -> None:
    table.commit(table.snapshot(), SCHEMA, [write(table, "x", "a"), write(table, "y", "odd~1.2_3")], [])
    frame = pl.scan_delta(table.place.uri).filter(pl.col("shard") == "odd~1.2_3").collect()
    assert frame["id"].to_list() == [f"y-{row}" for row in range(4)]
    assert frame["front"].to_list() == MATRIX.tolist()
    assert frame["mode"].to_list() == ["raw"] * 4
    again = pa.table(DeltaTable(table.place.uri).get_add_actions(flatten=True))
    assert sorted(again["num_records"].to_pylist()) == [4, 4]


def second_adds(table: FileTable, base: Snapshot, first: LiveFile) -> None:
    table.commit(base, SCHEMA, [write(table, "late")], [])


def second_removes(table: FileTable, base: Snapshot, first: LiveFile) -> None:
    table.commit(base, SCHEMA, [], [first])


def second_grows(table: FileTable, base: Snapshot, first: LiveFile) -> None:
    schema = SCHEMA.append(pa.field("camera", pa.string()))
    table.commit(base, schema, [write(table, "late", camera=["x"] * 4)], [])


@pytest.mark.parametrize("second", [second_adds, second_removes, second_grows])
def test_who_planned_on_an_older_version_is_refused(table: FileTable, second) -> None:
    first = write(table, "first")
    base = table.commit(table.snapshot(), SCHEMA, [first], [])
    won = table.commit(base, SCHEMA, [write(table, "won")], [])
    with pytest.raises(StoreBusyError, match=r"another run committed first; nothing of this run was published"):
        second(table, base, first)
    assert table.snapshot() == won
    assert table.schema() == SCHEMA


def test_the_first_commit_of_a_table_has_one_winner_too(table: FileTable) -> None:
    nothing = table.snapshot()
    won = table.commit(nothing, SCHEMA, [write(table, "won")], [])
    with pytest.raises(StoreBusyError):
        table.commit(nothing, SCHEMA, [write(table, "late")], [])
    assert table.snapshot() == won


def test_a_table_made_by_a_run_that_was_killed_is_taken_over(table: FileTable) -> None:
    nothing = table.snapshot()
    table.commit(nothing, SCHEMA, [], [])
    log = Path(table.place.path) / "_delta_log"
    for entry in sorted(log.glob("*.json"))[1:]:
        entry.unlink()  # killed between the making and the commit
    found = table.commit(nothing, SCHEMA, [write(table, "a")], [])
    assert len(found.files) == 1


@pytest.mark.parametrize("exists", [False, True])
def test_of_writers_at_the_same_time_exactly_one_wins(table: FileTable, exists: bool) -> None:
    base = table.commit(table.snapshot(), SCHEMA, [write(table, "base")], []) if exists else table.snapshot()
    files = [write(table, f"writer-{number}") for number in range(4)]
    start = threading.Barrier(len(files))
    outcomes: list[str] = []

    def commit(file: LiveFile) -> None:
        start.wait()
        try:
            table.commit(base, SCHEMA, [file], [])
            outcomes.append(file.path)
        except StoreBusyError:
            outcomes.append("refused")

    threads = [threading.Thread(target=commit, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (outcome for outcome in outcomes if outcome != "refused")
    assert len(outcomes) == len(files)
    assert set(table.snapshot().files) == {winner} | set(base.files)


def test_a_new_column_joins_and_old_rows_have_none(table: FileTable) -> None:
    base = table.commit(table.snapshot(), SCHEMA, [write(table, "old")], [])
    schema = SCHEMA.append(pa.field("camera", pa.string()))
    found = table.commit(base, schema, [write(table, "new", camera=["left"] * 4)], [])
    assert table.schema().field("camera").type == pa.string()
    frame = pl.scan_delta(table.place.uri).sort("id").collect()
    assert frame["camera"].to_list() == ["left"] * 4 + [None] * 4
    assert table.snapshot(base.version) == base
    # Who wants fewer columns takes none away.
    table.commit(found, SCHEMA, [write(table, "newer")], [])
    assert "camera" in table.schema().names


def test_the_log_is_kept_for_good(table: FileTable) -> None:
    table.commit(table.snapshot(), SCHEMA, [], [])
    kept = DeltaTable(table.place.uri).metadata().configuration
    assert kept["delta.enableExpiredLogCleanup"] == "false"


@pytest.mark.parametrize("content", ["{", json.dumps({"protocol": {"minReaderVersion": 99, "minWriterVersion": 99}})])
def test_a_damaged_log_is_no_empty_table(table: FileTable, content: str) -> None:
    base = table.commit(table.snapshot(), SCHEMA, [write(table, "a")], [])
    newest = sorted((Path(table.place.path) / "_delta_log").glob("*.json"))[-1]
    newest.write_text(content)
    for use in (table.snapshot, lambda: table.commit(base, SCHEMA, [write(table, "b")], [])):
        with pytest.raises(StoreError, match="table"):
            use()
