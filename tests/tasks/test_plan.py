"""A plan is a set difference: exactly the necessary shards are computed, and nothing else is opened."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import BadModelError, BadShardError, SettingsError
from storage.location import Location
from storage.shards import Shard
from tasks.plan import Plan, ShardWork, group_work, make_plan, prepare_models
from tasks.reweight import ReweightSpec, reweight_group

D = 32
MODES = {"raw", "per_sample", "batch_stat"}


def write(path: Path, name: str, rows: int = 30, seed: int = 0, ids: list[str] | None = None, dim: int = D) -> None:
    matrix = np.random.default_rng([seed, *name.encode()]).standard_normal((rows, dim)).astype(np.float32)
    table = {
        "id": pa.array([f"{name}-{row}" for row in range(rows)] if ids is None else ids, pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), dim),
        "note": [name] * rows,
    }
    pq.write_table(pa.table(table), path / f"{name}.parquet", compression="none")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in "abc":
        write(folder, name)
    return folder


@pytest.fixture
def plan_of(tmp_path: Path, source: Path, pipeline_of) -> Callable[..., Plan]:
    """Plan with changed settings, on the store of `tmp_path`."""

    def make(**settings: object) -> Plan:
        chosen = pipeline_of(source, tmp_path / "store", **settings)
        return make_plan(chosen, prepare_models(chosen))

    return make


@pytest.fixture
def published(tmp_path: Path, source: Path, run_stages, pipeline_of):
    """One run done; gives the function that does another."""

    def run(**settings: object):
        return run_stages(pipeline_of(source, tmp_path / "store", **settings))

    run()
    return run


def computed(plan: Plan) -> dict[str, set[str]]:
    return {work.shard.key: set(work.keys) for work in plan.work}


def test_first_plan_wants_everything(plan_of) -> None:
    plan = plan_of()
    assert computed(plan) == {"a": MODES, "b": MODES, "c": MODES}
    assert plan.base.version == -1
    assert len(plan.wanted) == 9
    assert plan.modes == ["raw", "per_sample", "batch_stat"]


def test_unchanged_source_is_not_opened(published, plan_of, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_input = Location.open_input

    def counting(place: Location) -> pa.NativeFile:
        opened.append(place.path)
        return open_input(place)

    monkeypatch.setattr(Location, "open_input", counting)
    assert not plan_of().work
    assert not [path for path in opened if path.startswith(str(source))]
    write(source, "b", seed=1)
    assert computed(plan_of()) == {"b": MODES}
    assert {path for path in opened if path.startswith(str(source))} == {str(source / "b.parquet")}


def rename(source: Path) -> None:
    (source / "b.parquet").rename(source / "z.parquet")


def test_another_precision_recomputes_what_models_make(published, plan_of) -> None:
    """Planned only: it computes on a GPU. `tests/flows/test_incremental.py` has the other settings."""
    assert computed(plan_of(reweight={"precision": "tf32"})) == dict.fromkeys("abc", MODES - {"raw"})


def test_renamed_shard_is_copied_with_its_quarantine(tmp_path: Path, source: Path, published) -> None:
    write(source, "b", ids=["b-0", "b-0", *(f"b-{row}" for row in range(2, 30))])
    _, _, before = published()
    rename(source)
    plan, results, after = published()
    assert not results
    assert {file.shard for file in plan.reused} == {"z"}
    assert (after.data.rows_features, after.data.quarantined) == (before.data.rows_features, {"duplicate_id": 1})


def test_copied_shard_holds_nothing_but_duplicates(source: Path, published) -> None:
    shutil.copy(source / "a.parquet", source / "copy.parquet")
    _, _, after = published()
    assert after.data.quarantined == {"duplicate_id": 30}
    assert after.data.rows_features == 90


def test_row_returns_when_the_owner_of_its_id_vanishes(source: Path, published) -> None:
    write(source, "c", ids=["a-0", *(f"c-{row}" for row in range(1, 30))])
    _, _, before = published()
    assert before.data.quarantined == {"duplicate_id": 1}
    (source / "a.parquet").unlink()
    plan, _, after = published()
    assert computed(plan) == {"c": MODES}
    assert not after.data.quarantined
    assert after.data.rows_features == 60


@pytest.mark.parametrize("damage", ["manifest", "keys", "garbage"])
def test_lost_manifest_changes_nothing(damage: str, tmp_path: Path, source: Path, published, plan_of) -> None:
    write(source, "c", ids=["a-0", "b-0", *(f"c-{row}" for row in range(2, 30))])
    published()
    before = plan_of()
    manifest = tmp_path / "store" / "manifest"
    if damage == "garbage":
        (manifest / "shards.parquet").write_bytes(b"PAR1 nothing")
    else:
        shutil.rmtree(manifest if damage == "manifest" else manifest / "keys")
    after = plan_of()
    assert not after.work
    assert after.wanted == before.wanted
    write(source, "b", seed=3)
    assert computed(plan_of()) == {"b": MODES}


def test_bad_shard_keeps_its_last_good_features(source: Path, published, plan_of) -> None:
    good = (source / "b.parquet").read_bytes()
    (source / "b.parquet").write_bytes(good[:-50])
    plan, _, after = published()
    [fault] = after.data.bad_shards
    assert (fault.shard, fault.kept) == ("b", True)
    assert "cannot be read as Parquet" in fault.reason
    assert not plan.work
    assert after.features.version == plan.base.version
    assert after.data.rows_features == 90
    (source / "b.parquet").write_bytes(good)
    assert not plan_of().work
    assert not plan_of().faults


def test_bad_shard_that_changes_to_another_length_keeps_its_last_good_features(source: Path, published) -> None:
    write(source, "b", dim=16)
    _, _, after = published()
    [fault] = after.data.bad_shards
    assert fault.kept
    assert "has 16 numbers a row, the models want 32" in fault.reason
    assert after.data.rows_features == 90


def test_features_of_an_old_model_do_not_stand_for_a_bad_shard(
    source: Path, tmp_path: Path, published, plan_of, tiny_models, make_checkpoint
) -> None:
    (source / "b.parquet").write_bytes(b"nothing")
    other = make_checkpoint(tmp_path / "other.safetensors", "per_sample", seed=5)
    plan = plan_of(models={**tiny_models.by_mode, "per_sample": str(other)})
    assert [fault.kept for fault in plan.faults] == [False]
    assert set(computed(plan)) == {"a", "c"}
    assert {key.shard for key in plan.wanted.values()} == {"a", "c"}


def test_bad_shard_owns_no_id_of_others(source: Path, published) -> None:
    write(source, "a", dim=16, ids=[f"b-{row}" for row in range(30)])
    write(source, "0", dim=16, ids=[f"c-{row}" for row in range(30)])
    _, _, after = published()
    assert [fault.shard for fault in after.data.bad_shards] == ["0", "a"]
    assert not after.data.quarantined


def test_interrupted_run_resumes_where_it_was(tmp_path: Path, source: Path, pipeline_of) -> None:
    settings = pipeline_of(source, tmp_path / "store")
    models = prepare_models(settings)
    plan = make_plan(settings, models)
    reweight_group(plan.work[:2], ReweightSpec.of(settings, models, plan.schema))
    again = make_plan(settings, models)
    assert computed(again) == {"c": MODES}
    assert sorted(file.path for file in again.reused) == sorted(
        path for path, key in plan.wanted.items() if key.shard in "ab"
    )
    cut = tmp_path / "store" / "features" / again.reused[0].path
    cut.write_bytes(cut.read_bytes()[:-20])
    assert computed(make_plan(settings, models)) == {"a": {cut.parent.parent.name.removeprefix("mode=")}, "c": MODES}


def test_live_file_that_is_gone_or_short_is_computed_again(tmp_path: Path, published, plan_of) -> None:
    features = tmp_path / "store" / "features"
    [gone] = (features / "mode=raw" / "shard=a").iterdir()
    [short] = (features / "mode=per_sample" / "shard=b").iterdir()
    content = gone.read_bytes()
    gone.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    assert computed(plan_of()) == {"a": {"raw"}, "b": {"per_sample"}}
    published()
    assert gone.read_bytes() == content
    assert not plan_of().work


def test_new_kept_column_joins_the_schema(tmp_path: Path, source: Path, published, plan_of) -> None:
    published(columns={"keep": ["note"]})
    assert plan_of(columns={"keep": ["note"]}).schema.field("note").type == pa.string()
    (source / "a.parquet").write_bytes(b"the first shard is bad now")
    table = pq.read_table(source / "b.parquet")
    for name in "bc":
        pq.write_table(table.append_column("more", pa.array([1] * 30)).set_column(
            0, "id", pa.array([f"{name}-{row}" for row in range(30)])), source / f"{name}.parquet")  # fmt: skip
    assert plan_of(columns={"keep": ["note", "more"]}).schema.field("more").type == pa.int64()


def test_nothing_usable_is_refused_before_anything_leaves(source: Path, published, plan_of) -> None:
    for name in "abc":
        write(source, name, rows=0)
    with pytest.raises(SettingsError, match="its 3 shards hold no row"):
        plan_of()
    for name in "abc":
        (source / f"{name}.parquet").unlink()
    with pytest.raises(SettingsError, match=r"holds no \.parquet file"):
        plan_of()


def test_model_of_another_length_is_refused(published, plan_of, make_checkpoint, tmp_path: Path, tiny_models) -> None:
    other = str(make_checkpoint(tmp_path / "other.safetensors", "per_sample", dim=16))
    with pytest.raises(BadShardError, match="has 32 numbers a row, the models want 16"):
        plan_of(models={"per_sample": other})
    with pytest.raises(BadModelError, match="different length"):
        plan_of(models={**tiny_models.by_mode, "per_sample": other})


@given(
    rows=st.lists(st.integers(1, 500), max_size=60),
    group_rows=st.integers(1, 1_000),
    workers=st.integers(1, 8),
)
def test_groups_hold_every_shard_once_in_order(rows: list[int], group_rows: int, workers: int) -> None:
    work = [ShardWork(Shard(str(at), "", 0, 0, ""), "", count, (), (), False, {}, "") for at, count in enumerate(rows)]
    groups = group_work(work, group_rows, workers)
    assert [item for group in groups for item in group] == work
    for group in groups:
        assert group
        assert sum(item.rows for item in group[:-1]) < group_rows
