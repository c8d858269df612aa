"""The whole job: what is served, what is rejected, what is computed again."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from frontalis.history import print_releases
from models.checkpoint import load, save
from models.seen import Seen, name_hashes
from schemas.errors import SettingsError
from schemas.releases import Release
from storage.location import Location
from storage.releases import Releases
from tasks.evaluation.released import evaluate_release
from tasks.maintenance.rollback import roll_back
from tasks.query import answer
from tasks.release import provenance
from tests.pipeline_fixtures import MILD_GATE


@pytest.fixture(scope="module")
def original(run_pipeline, tiny_source, tmp_path_factory):
    """A store with one release of the tiny source, and the outcome of its run."""
    store = tmp_path_factory.mktemp("original") / "store"
    return store, run_pipeline(tiny_source, store)


@pytest.fixture
def first(original, tmp_path):
    """The outcome of the first run; `tmp_path / "store"` is a copy of what it made."""
    shutil.copytree(original[0], tmp_path / "store")
    return original[1]


@pytest.fixture
def run_tiny(run_pipeline, tiny_source, tmp_path):
    """`run_tiny(**settings)` runs the job over the tiny source into one store."""
    return lambda **settings: run_pipeline(tiny_source, tmp_path / "store", **settings)


def history(store: Path):
    return Releases(Location(str(store))).all()


def test_first_run_publishes_everything(original) -> None:
    store, outcome = original
    assert (outcome.status, outcome.shards_computed, outcome.rows_computed) == ("promoted", 3, 280)
    (release,) = history(store)
    assert release.serving
    assert set(release.indexes) == {"raw", "per_sample", "batch_stat"}
    assert all(index.rows == 280 for index in release.indexes.values())
    figures = json.loads((store / f"reports/{release.release}/metrics.json").read_text())
    assert figures["release"]["release"] == release.release
    assert figures["evaluation"]["indexes"]["raw"] == {
        "kind": "Flat", "rows": 280, "recall_at_1": 1.0, "recall_at_10": 1.0, "queries": 0,
    }  # fmt: skip
    assert evaluate_release(str(store), resamples=0).indexes == outcome.evaluation.indexes
    assert Path(outcome.report).read_text().startswith("<!DOCTYPE html>")
    counts = pl.scan_delta(str(store / "features")).group_by("mode").len().collect()
    assert counts["len"].to_list() == [280, 280, 280]


def test_the_release_names_the_version_of_a_delta_table(run_pipeline, tiny_source, tmp_path) -> None:
    rows = pq.read_table(tiny_source)
    write_deltalake(tmp_path / "table", rows.drop_columns(["embedding"]).append_column(
        "embedding", rows["embedding"].cast(pa.list_(pa.float32()))), partition_by=["pose"])  # fmt: skip
    DeltaTable(tmp_path / "table").delete("id = '000000-000'")
    outcome = run_pipeline(tmp_path / "table", tmp_path / "store")
    assert (outcome.data.shards, outcome.data.rows_features) == (2, 279)
    [release] = history(tmp_path / "store")
    assert release.source_version == provenance(release)["source version"] == 1
    assert Release.model_validate_json(release.model_dump_json()) == release
    assert set(outcome.evaluation.populations["held_out"].modes["raw"].cells) >= {"frontal-frontal", "frontal-profile"}


def test_second_run_does_nothing(first, run_tiny, tmp_path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*") if file.is_file()}
    outcome = run_tiny()
    assert (outcome.status, outcome.shards_computed) == ("unchanged", 0)
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*") if file.is_file()}
    changed = {file.relative_to(tmp_path / "store").parts[0] for file in after if before.get(file) != after[file]}
    assert changed <= {".lock", "manifest"}
    assert len(history(tmp_path / "store")) == 1


def test_ruined_model_is_rejected_and_the_old_release_stays_served(
    first, run_tiny, tmp_path, tiny_models, make_checkpoint
) -> None:
    ruined = make_checkpoint(tmp_path / "ruined.safetensors", strength=1.0)
    outcome = run_tiny(
        models={**tiny_models.by_mode, "per_sample": str(ruined)}, evaluation={"resamples": 100}, gate={"cell": "all"}
    )
    assert outcome.status == "rejected"
    assert "per_sample" in outcome.reason
    assert "95% interval" in outcome.reason
    again = run_tiny(
        models={**tiny_models.by_mode, "per_sample": str(ruined)}, evaluation={"resamples": 100}, gate={"cell": "all"}
    )
    assert (again.status, again.shards_computed, again.release) == ("rejected", 0, outcome.release)
    assert again.reason.startswith(f"{outcome.reason} (nothing changed since {outcome.release}")
    old, new = history(tmp_path / "store")
    assert old.serving
    assert not new.serving
    assert old.release == first.release
    assert answer(str(tmp_path / "store"), "per_sample", ids=["000000-000"], k=1).release == first.release
    assert (tmp_path / "store" / new.report).exists()
    assert answer(str(tmp_path / "store"), "per_sample", ids=["000000-000"], k=1, release=new.release).results


def test_release_without_labels_does_not_replace_a_measured_one(first, run_pipeline, plain_source, tmp_path) -> None:
    store = tmp_path / "store"
    blind = run_pipeline(plain_source, store)
    assert blind.status == "rejected"
    assert f"cannot be compared with {first.release}" in blind.reason
    assert [release.serving for release in history(store)] == [True, False]
    forced = run_pipeline(plain_source, store, gate={**MILD_GATE, "unmeasured": "promote"})
    assert forced.status == "promoted"
    assert "without a measurement" in forced.reason


def test_store_without_any_labels_is_served_run_after_run(run_pipeline, plain_source, tiny_models, tmp_path) -> None:
    store = tmp_path / "store"
    for models in (tiny_models.by_mode, {"per_sample": str(tiny_models.per_sample)}):
        outcome = run_pipeline(plain_source, store, models=models)
        assert outcome.status == "promoted"
        assert "without a measurement" in outcome.reason


def test_model_trained_on_everybody_does_not_replace_a_measured_one(
    first, run_tiny, tmp_path, tiny_models, make_checkpoint
) -> None:
    checkpoint = load(make_checkpoint(tmp_path / "everybody.safetensors", strength=1.0))
    names = [f"subject-{number:06d}" for number in range(20)]
    keys = name_hashes(names, checkpoint.card.seen_key)
    save(checkpoint.card, checkpoint.model, tmp_path / "everybody.safetensors", Seen(keys, np.zeros(0, np.int64)))
    outcome = run_tiny(models={**tiny_models.by_mode, "per_sample": str(tmp_path / "everybody.safetensors")})
    assert outcome.status == "rejected"
    assert "fewer than two labelled held-out subjects" in outcome.reason


def test_model_with_unknown_training_subjects_does_not_replace_a_measured_one(
    first, run_tiny, tmp_path, tiny_models, make_checkpoint
) -> None:
    checkpoint = load(make_checkpoint(tmp_path / "silent.safetensors", seed=3))
    save(checkpoint.card, checkpoint.model, tmp_path / "silent.safetensors")
    outcome = run_tiny(models={**tiny_models.by_mode, "per_sample": str(tmp_path / "silent.safetensors")})
    assert outcome.status == "rejected"
    assert "per_sample: leakage cannot be excluded" in outcome.reason
    assert "n/e" in printed(tmp_path / "store")


def test_equal_model_passes_and_is_compared_with_the_served_release(first, run_tiny, tmp_path, tiny_models) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tiny_models.per_sample, other / "again.safetensors")
    outcome = run_tiny(
        models={**tiny_models.by_mode, "per_sample": str(other / "again.safetensors")},
        evaluation={"resamples": 100},
    )
    assert outcome.status == "promoted"
    assert outcome.shards_computed == 0  # the same bytes under another name are the same model
    assert first.release in outcome.reason


def test_new_evaluation_settings_measure_again_and_compute_nothing(first, run_tiny) -> None:
    outcome = run_tiny(evaluation={"resamples": 50})
    assert (outcome.status, outcome.shards_computed) == ("promoted", 0)


def test_pairs_are_checked_first_and_their_content_counts(run_tiny, tmp_path) -> None:
    pairs = tmp_path / "pairs.parquet"
    with pytest.raises(SettingsError, match="there is no such file"):
        run_tiny(evaluation={"resamples": 0, "pairs": str(pairs)})
    assert not (tmp_path / "store" / "features").exists()
    ids = ["000000-000", "000000-001", "000001-000", "000001-001"]
    for first, second, status in ((0, 1, "promoted"), (0, 1, "unchanged"), (2, 3, "promoted")):
        frame = pl.DataFrame({"id_a": [ids[first]], "id_b": [ids[second]], "same": [True], "fold": [0]})
        frame.write_parquet(pairs)
        assert run_tiny(evaluation={"resamples": 0, "pairs": str(pairs)}).status == status


def test_releases_show_the_gated_metric_of_each(first, run_tiny, tmp_path) -> None:
    run_tiny(gate={"cell": "all", "metric": "fnmr@1e-2", "tolerance": 1.0})
    lines = [line for line in printed(tmp_path / "store").splitlines() if line.startswith("r0000")]
    assert ["frontal–profile EER" in line.split("promoted")[0] for line in lines] == [True, False]
    assert "all pairs FNMR at own FMR 1%" in lines[1].split("promoted")[0]


def printed(store: Path) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_releases(history(store))
    return text.getvalue()


def test_roll_back_serves_the_old_release_and_later_runs_start_from_there(
    first, run_tiny, tmp_path, tiny_models, make_checkpoint
) -> None:
    other = make_checkpoint(tmp_path / "other.safetensors", seed=5)
    second = run_tiny(models={**tiny_models.by_mode, "per_sample": str(other)}, gate={"tolerance": 1.0})
    store = str(tmp_path / "store")
    assert answer(store, "per_sample", ids=["000000-000"], k=1).release == second.release
    roll_back(store, first.release)
    assert answer(store, "per_sample", ids=["000000-000"], k=1).release == first.release
    third = run_tiny()
    assert third.status == "promoted"
    assert (third.shards_computed, third.shards_reused) == (0, 3)  # the files of the first run are still there
    assert [release.serving for release in history(tmp_path / "store")] == [False, False, True]


def test_evaluate_measures_a_release_again(original) -> None:
    store, outcome = original
    again = evaluate_release(str(store), resamples=0)
    assert again.populations["held_out"].modes == outcome.evaluation.populations["held_out"].modes
    with pytest.raises(SettingsError, match="is not in"):
        evaluate_release(str(store), release="r00009-none")
