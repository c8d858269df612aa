"""Unreferenced files: all that no kept release, newest table or manifest references, nothing else."""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from schemas.errors import StoreError
from schemas.features import QUARANTINE_SCHEMA, feature_schema
from schemas.releases import IndexRef, ModelRef, Release
from schemas.reports import DataQuality, GateDecision
from storage.features import features_table, quarantine_table
from storage.leftovers import Leftover, find_leftovers
from storage.location import Location
from storage.manifest import Manifest, ShardRecord
from storage.releases import Releases
from storage.tables import FileTable, LiveFile


def put(store: Location, name: str, content: bytes = b"x") -> str:
    (store / name).write_bytes(content)
    return name


def live(table: FileTable, path: str) -> LiveFile:
    put(table.place, path)
    steps = dict(step.split("=") for step in path.split("/")[:-1])
    return LiveFile(path, 1, 1, steps)


def publish(store: Location, number: int, shard: str) -> Release:
    """One release with one file of everything; what the release before had in the tables is removed from them."""
    versions = []
    for table, schema, path in (
        (features_table(store), feature_schema(pa.string()), f"mode=raw/shard={shard}/{number}-{number}.parquet"),
        (quarantine_table(store), QUARANTINE_SCHEMA, f"shard={shard}/{number}-{number}.parquet"),
    ):
        base = table.snapshot()
        versions.append(table.commit(base, schema, [live(table, path)], base.files.values()).version)
    name = f"r{number:05d}-c0de"
    index = {"digest": "d", "size": 1, "ids_digest": "d", "rows": 1, "dim": 4, "factory": "Flat"}
    folder = f"indexes/{name}/raw"
    for file in ("index.html", "metrics.json", "plots/det.svg"):
        put(store, f"reports/{name}/{file}")
    release = Release(
        release=name,
        number=number,
        created=datetime(2026, 3, number, tzinfo=UTC),
        content=name,
        source="/faces",
        features_version=versions[0],
        quarantine_version=versions[1],
        models={
            "per_sample": ModelRef(
                path=put(store, f"models/{number}.safetensors"), file_digest="d", digest="d", statistic="frozen", dim=4
            )
        },
        indexes={
            "raw": IndexRef(
                path=put(store, f"{folder}/index.faiss"), ids_path=put(store, f"{folder}/ids.parquet"), **index
            )
        },
        data=DataQuality(shards=1, rows_read=1, rows_features=1, quarantined={}),
        gate=GateDecision(promoted=True, reason="better"),
        gated={},
        gated_name="EER",
        report=f"reports/{name}/index.html",
    )
    history = Releases(store)
    history.record(release, history.all())
    return release


@pytest.fixture
def store(tmp_path: Path) -> Location:
    return Location(str(tmp_path / "store"))


def names(found: list[Leftover]) -> list[str]:
    return [one.name for one in found]


FIRST = [
    "features/mode=raw/shard=a/1-1.parquet",
    "indexes/r00001-c0de/raw/ids.parquet",
    "indexes/r00001-c0de/raw/index.faiss",
    "models/1.safetensors",
    "quarantine/shard=a/1-1.parquet",
    "reports/r00001-c0de/index.html",
    "reports/r00001-c0de/metrics.json",
    "reports/r00001-c0de/plots/det.svg",
]


def test_what_kept_releases_name_is_needed(store: Location) -> None:
    first, second = publish(store, 1, "a"), publish(store, 2, "b")
    assert but_history(find_leftovers(store, [first, second])) == []
    assert but_history(find_leftovers(store, [second])) == FIRST


def but_history(found: list[Leftover]) -> list[str]:
    return [name for name in names(found) if not name.startswith("releases/")]


def test_the_newest_tables_are_needed_without_any_release(store: Location) -> None:
    publish(store, 1, "a")
    publish(store, 2, "b")
    found = names(find_leftovers(store, []))
    assert "features/mode=raw/shard=b/2-2.parquet" not in found
    assert "quarantine/shard=b/2-2.parquet" not in found
    assert set(FIRST) < set(found)
    assert "models/2.safetensors" in found


def test_of_the_history_only_its_newest_file_is_needed(store: Location) -> None:
    release = publish(store, 1, "a")
    publish(store, 2, "b")
    on_disk = {entry.name for entry in store.files(".parquet") if entry.name.startswith("releases/")}
    (newest,) = Releases(store).table.snapshot().files
    old = [name for name in names(find_leftovers(store, [release])) if name.startswith("releases/")]
    assert old == sorted(on_disk - {f"releases/{newest}"})
    assert len(old) == 1


def test_what_a_rollback_is_about_to_commit_is_no_leftover(store: Location) -> None:
    release = publish(store, 1, "a")
    now = Releases(store).table.snapshot().version
    put(store, f"releases/{now:08d}-0a.parquet")
    put(store, f"releases/{now + 1:08d}-0a.parquet")
    put(store, "releases/0a.parquet")
    assert names(find_leftovers(store, [release])) == [f"releases/{now:08d}-0a.parquet", "releases/0a.parquet"]


def test_files_of_interrupted_runs_are_left_over(store: Location) -> None:
    kept = publish(store, 1, "a")
    strays = {
        "features/.tmp-0123456789abcdef": True,
        "features/_delta_log/00000000000000000003.json.tmp-0": False,
        "features/_delta_log/_commit_0a1b.json.tmp": True,
        "features/_delta_log/00000000000000000003.json#1": True,
        "features/mode=raw/shard=a/0a-0b.parquet": False,
        "features/mode=raw/shard=z/.tmp-0123456789abcdef": True,
        "indexes/r00009-c0de/raw/index.faiss": False,
        "reports/r00001-c0de5/index.html": False,
        ".tmp-0123456789abcdef": True,
        "census/shards.parquet": False,
        "census/keys/0a-0b.parquet": False,
        "census/keys/.tmp-0123456789abcdef": True,
    }
    for name in strays:
        put(store, name, b"12345")
    found = {one.name: one for one in find_leftovers(store, [kept])}
    # Delta's log is Delta's own, but for the temporary files that a killed writer leaves.
    del strays["features/_delta_log/00000000000000000003.json.tmp-0"]
    assert {name: one.temporary for name, one in found.items()} == strays
    assert {one.size for one in found.values()} == {5}


def test_what_others_put_beside_the_store_is_left_alone(store: Location) -> None:
    kept = publish(store, 1, "a")
    for name in (
        "notes.txt",
        "backup/features/x.parquet",
        ".lock",
        "tombstones.json",
        "forgotten.jsonl",
        "features.txt",
        "features/mode=raw/shard=a/mine.parquet",
        "features/.tmp-mine",
        "notes/.tmp-0123456789abcdef",
        "quarantine/notes.txt",
        "models/1.bin",
        "models/trained.safetensors",
        "models/deep/1.safetensors",
        "indexes/mine/raw/index.faiss",
        "reports/2025/index.html",
        "reports/r00009-c0de/notes.txt",
        "manifest/notes.txt",
        "census/notes.txt",
    ):
        put(store, name)
    assert find_leftovers(store, [kept]) == []


def test_row_keys_are_needed_while_the_manifest_references_them(store: Location) -> None:
    kept = publish(store, 1, "a")
    manifest = Manifest(store)
    record = ShardRecord("a", "/a", 1, 1, "1", "ba", "c0", 1, 4, "string")
    put(store, "manifest/keys/c0-ba.parquet")
    put(store, "manifest/keys/d7-ba.parquet")
    assert names(find_leftovers(store, [kept])) == [
        "manifest/keys/c0-ba.parquet",
        "manifest/keys/d7-ba.parquet",
    ]
    manifest.save({"a": record})
    put(store, "manifest/keys/d7-ba.parquet")
    assert names(find_leftovers(store, [kept])) == ["manifest/keys/d7-ba.parquet"]


def test_an_empty_store_has_none(store: Location) -> None:
    assert find_leftovers(store, []) == []


def test_a_store_whose_releases_cannot_be_read_is_refused(store: Location) -> None:
    kept = publish(store, 1, "a")
    with pytest.raises(StoreError, match="at version 7 cannot be read"):
        find_leftovers(store, [kept.model_copy(update={"features_version": 7})])
