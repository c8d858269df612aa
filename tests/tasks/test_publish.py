"""Publishing: one commit a table, sums that add up, last good features kept, and nothing half visible."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import BadShardError, StoreBusyError, StoreError
from schemas.settings import ReweightSettings
from storage.features import features_table, quarantine_table
from storage.location import Location
from storage.tombstones import Tombstones
from tasks.plan import make_plan, prepare_models
from tasks.publish import publish
from tasks.reweight import ReweightSpec, reweight_group

D = 32


def write(path: Path, name: str, seed: int = 0, zeros: int = 0, first_id: str | None = None) -> None:
    matrix = np.random.default_rng([seed, *name.encode()]).standard_normal((20, D)).astype(np.float32)
    matrix[:zeros] = 0
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), D)
    ids = [first_id or f"{name}-0", *(f"{name}-{row}" for row in range(1, 20))]
    table = pa.table({"id": ids, "embedding": embedding})
    pq.write_table(table, path / f"{name}.parquet", compression="none", use_dictionary=False, write_page_checksum=True)


def spoil(path: Path) -> None:
    """Damage the vectors alone, so that only reading them finds it."""
    content = bytearray(path.read_bytes())
    vectors = np.array(pq.ParquetFile(path).read()["embedding"].to_pylist(), np.float32)
    content[content.find(vectors[5].tobytes()) + 2] ^= 1
    path.write_bytes(content)


def prepared(settings):
    """Everything up to the commit."""
    models = prepare_models(settings)
    plan = make_plan(settings, models)
    spec = ReweightSpec.of(settings, models, plan.schema)
    return plan, [result for group in plan.groups for result in reweight_group(group, spec)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, zeros in (("a", 0), ("b", 3), ("c", 1)):
        write(folder, name, zeros=zeros)
    return folder


@pytest.fixture
def settings(source: Path, tmp_path: Path, pipeline_of):
    return pipeline_of(source, tmp_path / "store")


def test_rows_add_up(settings, run_stages) -> None:
    _, results, published = run_stages(settings)
    data = published.data
    assert (data.shards, data.rows_read, data.rows_features, data.forgotten) == (3, 60, 56, 0)
    assert data.quarantined == {"zero_norm": 4}
    assert {result.shard: sum(result.quarantined.values()) for result in results} == {"a": 0, "b": 3, "c": 1}
    held = pl.scan_delta(f"{settings.store}/quarantine").collect()
    assert sorted(held["shard"].to_list()) == ["b", "b", "b", "c"]
    table = pl.scan_delta(f"{settings.store}/features").collect()
    assert table.group_by("mode").len().sort("mode").rows() == [("batch_stat", 56), ("per_sample", 56), ("raw", 56)]


def test_one_commit_a_table_and_none_without_a_change(settings, run_stages, source: Path) -> None:
    _, _, first = run_stages(settings)
    _, _, again = run_stages(settings)
    assert (again.features, again.quarantine, again.data) == (first.features, first.quarantine, first.data)
    write(source, "a", seed=1)
    (source / "c.parquet").unlink()
    _, _, changed = run_stages(settings)
    assert changed.features.version == first.features.version + 1
    assert changed.quarantine.version == first.quarantine.version + 1
    assert changed.data.rows_features == 37
    assert len(changed.features.files) == 6
    assert features_table(Location(settings.store)).snapshot(first.features.version).files == first.features.files


def test_nothing_is_visible_before_the_commit(settings, run_stages, source: Path) -> None:
    _, _, first = run_stages(settings)
    write(source, "b", seed=2)
    plan, results = prepared(settings)
    assert results
    assert features_table(Location(settings.store)).snapshot() == first.features
    assert publish(settings, plan, results).data.rows_features == 59


def test_shard_that_fails_while_it_is_read_keeps_its_last_good_rows(settings, run_stages, source: Path) -> None:
    _, _, first = run_stages(settings)
    write(source, "b", seed=4)
    spoil(source / "b.parquet")
    plan, results, second = run_stages(settings)
    [fault] = second.data.bad_shards
    assert (fault.shard, fault.kept) == ("b", True)
    assert "cannot be read as Parquet" in fault.reason
    assert [result.fault is None for result in results] == [False]
    assert not plan.work
    assert second.features == first.features
    assert second.quarantine == first.quarantine
    assert second.data.model_copy(update={"bad_shards": []}) == first.data
    write(source, "b", seed=4)
    _, _, third = run_stages(settings)
    assert not third.data.bad_shards
    assert third.data.rows_features == 59


@pytest.mark.parametrize("unreadable", [False, True], ids=["while it is read", "at once"])
@pytest.mark.parametrize("other", ["a", "c"])
def test_ids_of_a_bad_shard_that_moved_elsewhere_stay_its_own(
    settings, run_stages, source: Path, tmp_path: Path, other: str, unreadable: bool
) -> None:
    """No id is twice in a release, and the last good features stay whole, until the shard is repaired."""
    write(source, "b")
    _, _, first = run_stages(settings)
    write(source, other, seed=1, first_id="b-4")
    write(source, "b", seed=2)
    spoil(source / "b.parquet")
    for number in range(3):
        if unreadable or number == 2:  # what an earlier run read in part cannot be read at all in the last one
            (source / "b.parquet").write_bytes(b"not Parquet")
        _, _, published = run_stages(settings)
        assert [(fault.shard, fault.kept) for fault in published.data.bad_shards] == [("b", True)]
        assert published.features.of_shard("b") == first.features.of_shard("b")
        assert published.data.quarantined["duplicate_id"] == 1
        ids = pl.scan_delta(f"{settings.store}/features").filter(pl.col("mode") == "raw").select("id").collect()
        assert ids["id"].is_unique().all()
    write(source, "b", seed=2, first_id="b-new")
    table = pq.read_table(source / "b.parquet")
    pq.write_table(table.filter(pa.compute.not_equal(table["id"], "b-4")), source / "b.parquet")
    _, _, repaired = run_stages(settings)
    assert "duplicate_id" not in repaired.data.quarantined
    ids = pl.scan_delta(f"{settings.store}/features").filter(pl.col("mode") == "raw").select("id", "shard").collect()
    assert ids.filter(pl.col("id") == "b-4")["shard"].to_list() == [other]
    fresh = run_stages(settings.model_copy(update={"store": str(tmp_path / "fresh")})).published
    assert repaired.data == fresh.data
    assert set(repaired.features.files) == set(fresh.features.files)


def test_bad_shard_that_is_left_out_owns_no_id(settings, run_stages, make_checkpoint, source: Path, tmp_path) -> None:
    run_stages(settings)
    write(source, "c", first_id="a-4")
    (source / "a.parquet").write_bytes(b"not Parquet")
    other = make_checkpoint(tmp_path / "other.safetensors", "per_sample", seed=5)
    _, _, published = run_stages(settings.model_copy(update={"models": {"per_sample": str(other)}}))
    assert [(fault.shard, fault.kept) for fault in published.data.bad_shards] == [("a", False)]
    assert published.data.quarantined == {"zero_norm": 3}
    assert "a-4" in pl.scan_delta(f"{settings.store}/features").select("id").collect()["id"].to_list()


@pytest.mark.parametrize("unreadable", [False, True], ids=["while it is read", "at once"])
@pytest.mark.parametrize("row", [2, 0], ids=["features", "quarantine"])
def test_bad_shard_with_forgotten_rows_is_left_out(
    settings, run_stages, source: Path, unreadable: bool, row: int
) -> None:
    """Its last good rows were matched with an older list, of which `forget` could not erase them."""
    write(source, "b", zeros=1)
    run_stages(settings)
    tombstones = Tombstones(Location(settings.store))
    tombstones.add([tombstones.tombstone("id", f"b-{row}")])
    if unreadable:
        (source / "b.parquet").write_bytes(b"not Parquet")
    else:
        write(source, "b", seed=4)
        spoil(source / "b.parquet")
    _, _, published = run_stages(settings)
    [fault] = published.data.bad_shards
    assert (fault.shard, fault.kept) == ("b", False)
    assert "somebody who was forgotten, so they are left out" in fault.reason
    for snapshot in (published.features, published.quarantine):
        assert snapshot.of_shard("b") == []
    tombstones.undo(tombstones.tombstone("id", f"b-{row}").mark)
    write(source, "b")
    data = run_stages(settings).published.data
    assert (data.rows_read, data.forgotten) == (60, 0)


def test_shard_of_mostly_bad_rows_keeps_its_last_good_ones(settings, run_stages, source: Path) -> None:
    _, _, first = run_stages(settings)
    write(source, "a", seed=5, zeros=11)
    _, _, second = run_stages(settings)
    [fault] = second.data.bad_shards
    assert (fault.shard, fault.kept) == ("a", True)
    assert "11 of 20 rows are bad (11 zero_norm); write it again, or raise [reweight] max_bad" in fault.reason
    assert (second.features, second.quarantine) == (first.features, first.quarantine)
    tolerant = settings.model_copy(update={"reweight": ReweightSettings(max_bad_rows_per_shard=1.0)})
    _, _, third = run_stages(tolerant)
    assert not third.data.bad_shards
    assert third.data.quarantined == {"zero_norm": 15}


def test_new_shard_that_fails_is_left_out(settings, run_stages, source: Path) -> None:
    spoil(source / "b.parquet")
    _, _, published = run_stages(settings)
    assert [(fault.shard, fault.kept) for fault in published.data.bad_shards] == [("b", False)]
    assert (published.data.shards, published.data.rows_read, published.data.rows_features) == (2, 40, 39)
    assert published.data.quarantined == {"zero_norm": 1}


def test_second_of_two_runs_on_one_base_is_refused(settings, run_stages, source: Path) -> None:
    run_stages(settings)
    write(source, "a", seed=7)
    first, second = prepared(settings), prepared(settings)
    assert not second[1]
    published = publish(settings, *first)
    with pytest.raises(StoreBusyError, match="another run committed first"):
        publish(settings, *second)
    assert features_table(Location(settings.store)).snapshot() == published.features
    assert not make_plan(settings, prepare_models(settings)).work


def test_source_without_a_usable_row_leaves_the_table_alone(settings, run_stages, source: Path) -> None:
    _, _, first = run_stages(settings)
    for name in "abc":
        write(source, name, zeros=20)
    settings = settings.model_copy(update={"reweight": ReweightSettings(max_bad_rows_per_shard=1.0)})
    with pytest.raises(BadShardError, match="no row can be used, so nothing was published: every row is bad"):
        run_stages(settings)
    assert features_table(Location(settings.store)).snapshot() == first.features
    assert quarantine_table(Location(settings.store)).snapshot() == first.quarantine


def test_rows_that_went_nowhere_are_noticed(settings) -> None:
    plan, results = prepared(settings)
    for file in Path(settings.store, "quarantine").rglob("shard=b/*.parquet"):
        file.unlink()
    with pytest.raises(StoreError, match="shard b: of 20 rows 17 became features, 0 are in quarantine"):
        publish(settings, plan, results)


def test_modes_that_disagree_are_noticed(settings) -> None:
    plan, results = prepared(settings)
    short = [replace(file, rows=19) if "mode=raw" in file.path else file for file in results[0].files]
    with pytest.raises(StoreError, match="shard a: modes hold different rows"):
        publish(settings, plan, [replace(results[0], files=short), *results[1:]])
