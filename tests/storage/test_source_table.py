"""A Delta table as source: the files of its newest version only; what cannot be honoured is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from schemas.errors import BadShardError, SettingsError
from schemas.settings import ColumnNames
from storage.location import Location
from storage.shards import Shard, content_digest, find_shards, read_schema, still_same, stream_blocks

COLUMNS = ColumnNames(keep=("note",))


def rows(*ids: str, pose: str | None = "frontal", **more: object) -> pa.Table:
    embedding = pa.array([[float(at), 1.0] for at in range(len(ids))], pa.list_(pa.float32()))
    poses = pa.array([pose] * len(ids), pa.string())
    return pa.table({"id": list(ids), "pose": poses, "embedding": embedding, **more})


def shards_of(table: Path) -> list[Shard]:
    return find_shards(Location(str(table)), COLUMNS)


def read(table: Path, *columns: str) -> list[dict[str, object]]:
    found = []
    for shard in shards_of(table):
        for _, block in stream_blocks(shard, columns, 4):
            found += block.to_pylist()
    return sorted(found, key=str)


def ids_of(table: Path) -> list[object]:
    return [row["id"] for row in read(table, "id")]


def rewrite_log(table: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Change every action of the first commit."""
    log = table / "_delta_log" / f"{0:020}.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        change(action)
    log.write_text("\n".join(map(json.dumps, actions)) + "\n")


def test_removed_files_are_not_shards(tmp_path: Path) -> None:
    write_deltalake(tmp_path, rows("a", "b", "c"))
    write_deltalake(tmp_path, rows("d", "e"), mode="append")
    assert ids_of(tmp_path) == ["a", "b", "c", "d", "e"]
    DeltaTable(tmp_path).delete("id = 'b'")
    assert ids_of(tmp_path) == ["a", "c", "d", "e"]
    assert len(list(tmp_path.glob("*.parquet"))) == 3
    assert {shard.version for shard in shards_of(tmp_path)} == {2}
    write_deltalake(tmp_path, rows("z"), mode="overwrite")
    assert ids_of(tmp_path) == ["z"]
    DeltaTable(tmp_path).restore(1)
    assert ids_of(tmp_path) == ["a", "b", "c", "d", "e"]
    DeltaTable(tmp_path).create_checkpoint()
    assert ids_of(tmp_path) == ["a", "b", "c", "d", "e"]


def test_a_shard_is_described_by_the_log_and_not_by_the_file(tmp_path: Path) -> None:
    write_deltalake(tmp_path, rows("a", "b"))
    [shard] = shards_of(tmp_path)
    assert shard.size == Path(shard.uri).stat().st_size
    content = content_digest(shard)
    Path(shard.uri).touch()
    assert shards_of(tmp_path) == [shard]
    assert still_same(shard)
    assert content_digest(shard) == content
    Path(shard.uri).unlink()
    assert shards_of(tmp_path) == [shard]
    assert not still_same(shard)
    with pytest.raises(BadShardError, match="cannot be found"):
        read_schema(shard)


ODD = ["a b", "ü/x=%", "frontal", None]


def test_partition_values_come_from_the_log(tmp_path: Path) -> None:
    for number, pose in enumerate(ODD):
        write_deltalake(tmp_path, rows(f"i{number}", pose=pose), partition_by=["pose"], mode="append")
    assert {row["id"]: row["pose"] for row in read(tmp_path, "id", "pose")} == {
        f"i{number}": pose for number, pose in enumerate(ODD)
    }
    assert all(read_schema(shard)[0].field("pose").type == pa.string() for shard in shards_of(tmp_path))


def test_the_id_may_be_a_partition_and_nothing_else_be_read(tmp_path: Path) -> None:
    write_deltalake(tmp_path, rows("a", "b", "c"), partition_by=["id"])
    assert ids_of(tmp_path) == ["a", "b", "c"]


def test_a_column_that_was_added_later_is_null_in_older_files(tmp_path: Path) -> None:
    write_deltalake(tmp_path, rows("a"))
    write_deltalake(tmp_path, rows("b", note=[7]), mode="append", schema_mode="merge")
    assert read(tmp_path, "id", "note") == [{"id": "a", "note": None}, {"id": "b", "note": 7}]
    assert [str(read_schema(shard)[0].field("note").type) for shard in shards_of(tmp_path)] == ["int64", "int64"]


def _vector(action: dict[str, dict[str, object]]) -> None:
    features = ["deletionVectors"]
    if "protocol" in action:
        action["protocol"] = {
            "minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": features, "writerFeatures": features,
        }  # fmt: skip
    if "add" in action:
        action["add"]["deletionVector"] = {
            "storageType": "u", "pathOrInlineDv": "ab^-aqEH.-t@S}K{vb[*k^", "offset": 4, "sizeInBytes": 40,
            "cardinality": 1,
        }  # fmt: skip


def _inline_vector(action: dict[str, dict[str, object]]) -> None:
    _vector(action)
    if "add" in action:
        action["add"]["deletionVector"] = {
            "storageType": "i", "pathOrInlineDv": "wi5b=000010000siXQKl0rr91000f55c8Xg0@@D72lkbi5=-{L",
            "sizeInBytes": 40, "cardinality": 6,
        }  # fmt: skip


def _mapped(action: dict[str, dict[str, object]]) -> None:
    if "protocol" in action:
        action["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
    if "metaData" in action:
        schema = json.loads(str(action["metaData"]["schemaString"]))
        for number, field in enumerate(schema["fields"], 1):
            field["metadata"] = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": f"col-{number}"}
        action["metaData"]["schemaString"] = json.dumps(schema)
        action["metaData"]["configuration"] = {"delta.columnMapping.mode": "name"}


def _future(action: dict[str, dict[str, object]]) -> None:
    if "protocol" in action:
        action["protocol"] = {"minReaderVersion": 99, "minWriterVersion": 99}


def _elsewhere(action: dict[str, dict[str, object]]) -> None:
    if "add" in action:
        action["add"]["path"] = "/elsewhere/part-0.parquet"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_vector, "version 0 of the Delta table deletes rows by deletion vectors"),
        (_inline_vector, "version 0 of the Delta table deletes rows by deletion vectors"),
        (_mapped, r"mapped by name \(delta\.columnMapping\.mode\)"),
        (_future, r"its Delta log cannot be read \(.*99"),
        (_elsewhere, "lists /elsewhere/part-0.parquet, which is outside of it"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    tmp_path: Path, change: Callable[[dict[str, dict[str, object]]], None], says: str
) -> None:
    write_deltalake(tmp_path, rows("a", "b"))
    rewrite_log(tmp_path, change)
    with pytest.raises(SettingsError, match=says):
        shards_of(tmp_path)


def test_deletion_vectors_that_are_allowed_but_absent_are_no_obstacle(tmp_path: Path) -> None:
    write_deltalake(tmp_path, rows("a", "b"))
    rewrite_log(tmp_path, lambda action: _vector(action) if "protocol" in action else None)
    assert ids_of(tmp_path) == ["a", "b"]


def test_a_damaged_log_and_an_empty_table_are_refused(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "empty", rows("a").slice(0, 0))
    with pytest.raises(SettingsError, match="holds no file at version 0 of the Delta table"):
        shards_of(tmp_path / "empty")
    write_deltalake(tmp_path / "damaged", rows("a"))
    (tmp_path / "damaged" / "_delta_log" / f"{0:020}.json").write_text("{")
    with pytest.raises(SettingsError, match="damaged: its Delta log cannot be read"):
        shards_of(tmp_path / "damaged")
    (tmp_path / "hollow" / "_delta_log").mkdir(parents=True)
    pq.write_table(rows("a"), tmp_path / "hollow" / "a.parquet")
    with pytest.raises(SettingsError, match="hollow: its Delta log cannot be read"):
        shards_of(tmp_path / "hollow")


@pytest.mark.parametrize("source", ["", "shards"])
def test_a_folder_with_a_table_below_is_refused(tmp_path: Path, source: str) -> None:
    folder = tmp_path / "shards"
    write_deltalake(folder / "day=1" / "table", rows("a"))
    pq.write_table(rows("b"), folder / "b.parquet")
    with pytest.raises(SettingsError, match=r"day=1/table below it is a Delta table.*pass the table itself"):
        shards_of(tmp_path / source)


@pytest.mark.parametrize("part", ["pose=frontal", "pose=frontal/file", "link"])
def test_a_part_of_a_table_is_refused(tmp_path: Path, part: str) -> None:
    table = tmp_path / "table"
    write_deltalake(table, rows("a"), partition_by=["pose"])
    (tmp_path / "link").symlink_to(table / "pose=frontal")
    [file] = (table / "pose=frontal").iterdir()
    place = {"pose=frontal/file": file, "link": tmp_path / "link"}.get(part, table / part)
    with pytest.raises(SettingsError, match=r"is inside the Delta table .*/table, .* pass the table"):
        shards_of(place)


def test_a_hidden_table_beside_shards_is_passed_over(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "_old", rows("a"))
    pq.write_table(rows("b"), tmp_path / "b.parquet")
    assert ids_of(tmp_path) == ["b"]
