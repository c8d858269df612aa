"""Sources that are more than a folder of files: Delta tables and hive folders, through a run and through training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from metrics.poses import UNKNOWN
from schemas.errors import SettingsError
from schemas.metrics import POSE_CLASSES
from schemas.settings import ColumnNames
from storage.features import features_table
from storage.location import Location
from storage.manifest import Manifest
from tasks.evaluation.rows import read_subject_index
from tasks.explain import explain_model
from tasks.training.rows import read_training_rows

D = 32


def rows(first: int, count: int, **columns: object) -> pa.Table:
    """Rows number `first` …, each with its own vector; two subjects unless the columns say otherwise."""
    numbers = range(first, first + count)
    vectors = np.stack([vector(number) for number in numbers])
    subjects = [f"s{number % 2}" for number in numbers]
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), D).cast(pa.list_(pa.float32()))
    found = {"id": [f"i{number:02d}" for number in numbers], "subject": subjects, "embedding": embedding, **columns}
    return pa.table({name: column for name, column in found.items() if column is not None})


def vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(D).astype(np.float32)


def features(store: Path) -> pl.DataFrame:
    """The raw features, each checked to be the vector of its id."""
    found = pl.scan_delta(str(store / "features")).collect()
    assert found.group_by("mode").len()["len"].n_unique() == 1
    raw = found.filter(mode="raw").sort("id")
    for name, front in raw.select("id", "front").iter_rows():
        np.testing.assert_array_equal(np.array(front, np.float32), vector(int(name.removeprefix("i"))))
    return raw


def names(store: Path) -> set[str]:
    return {Path(path).name for path in DeltaTable(store / "features").file_uris()}


# A Delta table as source.


def test_rows_deleted_in_a_delta_table_leave_the_features(tmp_path: Path, run_stages, pipeline_of) -> None:
    source, store = tmp_path / "table", tmp_path / "store"
    settings = pipeline_of(source, store)
    write_deltalake(source, rows(0, 6))
    write_deltalake(source, rows(6, 4), mode="append")
    plan, _, published = run_stages(settings)
    assert plan.source_version == 1
    assert published.data.rows_read == published.data.rows_features == 10
    before = names(store)

    DeltaTable(source).delete("id = 'i02'")
    plan, _, published = run_stages(settings)
    assert (plan.source_version, len(plan.work)) == (2, 1)
    assert published.data.rows_read == published.data.rows_features == 9
    assert features(store)["id"].to_list() == [f"i{number:02d}" for number in range(10) if number != 2]
    assert len(names(store) & before) == 3  # of the other shard, in three modes

    assert not run_stages(settings).plan.work

    write_deltalake(source, rows(20, 3), mode="overwrite")
    assert run_stages(settings).published.data.rows_read == 3
    assert features(store)["id"].to_list() == ["i20", "i21", "i22"]
    assert read_training_rows([str(source)], ColumnNames()).subjects.tolist() == ["s0", "s1", "s0"]


def test_a_live_file_that_is_lost_keeps_its_features(tmp_path: Path, run_stages, pipeline_of) -> None:
    source, store = tmp_path / "table", tmp_path / "store"
    write_deltalake(source, rows(0, 6))
    run_stages(pipeline_of(source, store))
    for file in source.glob("*.parquet"):
        file.unlink()
    write_deltalake(source, rows(6, 4), mode="append")
    assert run_stages(pipeline_of(source, store)).published.data.rows_features == 10  # unchanged, so it is not read
    assert len(features(store)) == 10


def test_partition_values_of_a_delta_table_are_columns(tmp_path: Path, run_stages, pipeline_of) -> None:
    source, store = tmp_path / "table", tmp_path / "store"
    year = pa.array([2024, 2024, None, 2026], pa.int32())
    write_deltalake(source, rows(0, 4, pose=["a b", "ü/%", None, "frontal"], year=year), partition_by=["pose", "year"])
    data = run_stages(pipeline_of(source, store, columns={"keep": ["year"]})).published.data
    assert (data.shards, data.rows_features) == (4, 4)
    found = features(store)
    assert found["pose"].to_list() == ["a b", "ü/%", None, "frontal"]
    assert (found["year"].to_list(), found.schema["year"]) == ([2024, 2024, None, 2026], pl.Int32)


def test_a_table_below_the_source_is_refused_before_any_write(tmp_path: Path, run_stages, pipeline_of) -> None:
    write_deltalake(tmp_path / "source" / "table", rows(0, 4))
    pq.write_table(rows(4, 4), tmp_path / "source" / "a.parquet")
    with pytest.raises(SettingsError, match="pass the table itself"):
        run_stages(pipeline_of(tmp_path / "source", tmp_path / "store"))
    assert not (tmp_path / "store" / "features").exists()
    with pytest.raises(SettingsError, match="pass the table itself"):
        read_training_rows([str(tmp_path / "source")], ColumnNames())


# Hive folders.


def with_pyarrow(table: pa.Table, folder: Path, keys: list[str]) -> None:
    ds.write_dataset(table, folder, format="parquet", partitioning=keys, partitioning_flavor="hive")


def with_polars(table: pa.Table, folder: Path, keys: list[str]) -> None:
    pl.DataFrame(table).write_parquet(pl.PartitionBy(folder, key=keys))


@pytest.mark.parametrize("write", [with_pyarrow, with_polars])
def test_hive_folders_give_their_columns(
    tmp_path: Path, write: Callable[[pa.Table, Path, list[str]], None], run_stages, pipeline_of
) -> None:
    source, store = tmp_path / "hive", tmp_path / "store"
    poses = ["frontal", "profile", "a b", "ü/x=%", None, "frontal"]
    yaws = [0.0, 40.5, -3.0, None, 12.0, 0.0]
    subjects = ["007", "7", "Jürgen %41", "a/b", None, "007"]
    years = [2024, 2024, 2025, 2025, None, 2024]
    table = rows(0, 6, subject=subjects, pose=poses, yaw=pa.array(yaws, pa.float32()), year=years)
    write(table, source, ["subject", "pose", "yaw", "year"])
    columns = {"keep": ["year"]}
    data = run_stages(pipeline_of(source, store, columns=columns)).published.data
    assert (data.shards, data.rows_features, data.bad_shards) == (5, 6, [])
    found = features(store)
    assert found["subject"].to_list() == subjects
    assert found["pose"].to_list() == poses
    assert found["yaw"].to_list() == yaws
    assert (found["year"].to_list(), found.schema["year"]) == (years, pl.Int64)

    trained = read_training_rows([str(source)], ColumnNames())
    assert sorted(trained.subjects.tolist()) == sorted(name for name in subjects if name)
    classes = {name: POSE_CLASSES[code] if code != UNKNOWN else None for name, code in
               zip(trained.subjects.tolist(), trained.classes.tolist(), strict=True)}  # fmt: skip
    assert (classes["007"], classes["7"]) == ("frontal", "profile")


def move(source: Path, pose: str, to: str) -> None:
    (source / f"pose={pose}").rename(source / f"pose={to}")


def test_a_file_moved_to_another_partition_gets_other_features(tmp_path: Path, run_stages, pipeline_of) -> None:
    source, store = tmp_path / "hive", tmp_path / "store"
    settings = pipeline_of(source, store)
    with_pyarrow(rows(0, 4, pose=["frontal"] * 2 + ["half"] * 2), source, ["pose"])
    run_stages(settings)
    before = names(store)
    move(source, "frontal", "profile")
    plan, _, published = run_stages(settings)
    assert len(plan.work) == 1
    assert published.data.rows_features == 4
    assert features(store)["pose"].to_list() == ["profile"] * 2 + ["half"] * 2
    assert len(names(store) & before) == 3

    move(source, "profile", "frontal")
    run_stages(settings)
    assert names(store) == before


def test_equal_files_of_different_partitions_are_told_apart(tmp_path: Path, run_stages, pipeline_of) -> None:
    source, store = tmp_path / "hive", tmp_path / "store"
    for name in ("i00", "i01"):
        (source / f"id={name}").mkdir(parents=True)
    same = rows(0, 1, id=None, subject=None)
    pq.write_table(same, source / "id=i00" / "a.parquet")
    pq.write_table(same, source / "id=i01" / "a.parquet")
    data = run_stages(pipeline_of(source, store)).published.data
    assert (data.rows_features, data.quarantined) == (2, {})
    raw = pl.scan_delta(str(store / "features")).filter(mode="raw").collect()
    assert sorted(raw["id"].to_list()) == ["i00", "i01"]


def test_a_column_of_the_file_comes_before_that_of_its_folder(tmp_path: Path, run_stages, pipeline_of) -> None:
    source, store = tmp_path / "hive", tmp_path / "store"
    (source / "pose=frontal").mkdir(parents=True)
    pq.write_table(rows(0, 2, pose=["half", "profile"]), source / "pose=frontal" / "a.parquet")
    run_stages(pipeline_of(source, store))
    assert features(store)["pose"].to_list() == ["half", "profile"]


def test_folders_that_give_no_column_change_no_name(tmp_path: Path, run_stages, pipeline_of) -> None:
    written = {}
    for folder in ("day-1", "day=1"):
        source = tmp_path / folder / "source"
        (source / folder).mkdir(parents=True)
        pq.write_table(rows(0, 4), source / folder / "a.parquet")
        run_stages(pipeline_of(source, tmp_path / folder / "store"))
        written[folder] = names(tmp_path / folder / "store")
    assert written["day-1"] == written["day=1"]


def test_explain_reads_hive_folders_and_delta_tables(tmp_path: Path, tiny_models) -> None:
    table = rows(0, 16, pose=["frontal"] * 8 + ["profile"] * 8)
    with_pyarrow(table, tmp_path / "hive", ["subject", "pose"])
    write_deltalake(tmp_path / "table", table, partition_by=["pose"])
    for source in ("hive", "table"):
        found = explain_model(str(tiny_models.per_sample), str(tmp_path / source), str(tmp_path / "out"))
        assert found.related


# Blank subjects.

BLANK = ["s0", "", "s1", "  ", None, "\t", "s0", "s1"]


def test_a_blank_subject_is_unknown_and_counted(tmp_path: Path, run_stages, pipeline_of) -> None:
    source, store = tmp_path / "source", tmp_path / "store"
    source.mkdir()
    pq.write_table(rows(0, 8, subject=BLANK), source / "a.parquet")
    _, [result], published = run_stages(pipeline_of(source, store))
    assert published.data.blank_subjects == 3
    assert result.warnings == ["shard a: 3 blank subjects are unknown now"]
    assert features(store)["subject"].to_list() == ["s0", None, "s1", None, None, None, "s0", "s1"]
    assert run_stages(pipeline_of(source, store)).published.data.blank_subjects == 3  # although nothing is read
    found = read_subject_index(Location(str(store)), features_table(Location(str(store))).snapshot())
    assert (found.names, found.unlabelled) == (["s0", "s1"], 4)

    trained = read_training_rows([str(source)], ColumnNames())
    assert trained.subjects.tolist() == ["s0", "s1", "s0", "s1"]
    assert trained.skipped == {"no_subject": 1, "blank_subject": 3}
    everything = read_training_rows([str(source)], ColumnNames(), labelled=False)
    assert everything.subjects.tolist() == ["s0", "", "s1", "", "", "", "s0", "s1"]


def test_features_of_earlier_builds_with_blank_subjects(tmp_path: Path, run_stages, pipeline_of, monkeypatch) -> None:
    """They are evaluated as unknown, and computed again once the source is read."""
    source, store = tmp_path / "source", tmp_path / "store"
    source.mkdir()
    pq.write_table(rows(0, 8, subject=BLANK), source / "a.parquet")
    pq.write_table(rows(8, 4), source / "b.parquet")
    with monkeypatch.context() as earlier:
        for module in ("storage.manifest", "tasks.reweight"):
            earlier.setattr(f"{module}.known_subjects", lambda subjects: (subjects, 0))
        run_stages(pipeline_of(source, store))
    assert features(store)["subject"].to_list()[:4] == ["s0", "", "s1", "  "]
    before = names(store)
    manifest = Manifest(Location(str(store))).load()
    manifest.save({key: replace(record, blank_subjects=None) for key, record in manifest.records.items()})
    found = read_subject_index(Location(str(store)), features_table(Location(str(store))).snapshot())
    assert (found.names, found.unlabelled) == (["s0", "s1"], 4)

    plan, _, published = run_stages(pipeline_of(source, store))
    assert [work.shard.key for work in plan.work] == ["a"]
    assert published.data.blank_subjects == 3
    assert features(store)["subject"].to_list()[:4] == ["s0", None, "s1", None]
    assert len(names(store) & before) == 3
