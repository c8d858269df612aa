"""The whole job as a real flow: what is served, what is rejected, what is computed again, what Prefect shows."""

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
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from typer.testing import CliRunner

from flows.evaluate import evaluate
from flows.reprocess import reprocess
from frontalis.cli import app
from frontalis.printing import print_releases
from frontalis.process import Command
from models.checkpoint import load, save
from models.seen import Seen, name_hashes
from schemas.errors import SettingsError
from schemas.releases import Release
from schemas.settings import pipeline
from storage.location import Location
from storage.releases import Releases
from tasks.maintenance.rollback import roll_back
from tasks.query import answer
from tasks.release import provenance
from tests.pipeline_fixtures import MILD_GATE


@pytest.fixture
def run_tiny(run_pipeline, tiny_source, tmp_path):
    """`run_tiny(**settings)` runs the flow over the tiny source into one store."""
    return lambda **settings: run_pipeline(tiny_source, tmp_path / "store", **settings)


def history(store: Path):
    return Releases(Location(str(store))).all()


def test_first_run_publishes_everything(run_tiny, tmp_path) -> None:
    outcome = run_tiny()
    assert (outcome.status, outcome.shards_computed, outcome.rows_computed) == ("promoted", 3, 280)
    store = tmp_path / "store"
    (release,) = history(store)
    assert release.serving
    assert set(release.indexes) == {"raw", "per_sample", "batch_stat"}
    assert all(index.rows == 280 for index in release.indexes.values())
    figures = json.loads((store / f"reports/{release.release}/metrics.json").read_text())
    assert figures["release"]["release"] == release.release
    assert figures["evaluation"]["indexes"]["raw"] == {
        "kind": "Flat", "rows": 280, "recall_at_1": 1.0, "recall_at_10": 1.0, "queries": 0,
    }  # fmt: skip
    assert evaluate(str(store), resamples=0).indexes == outcome.evaluation.indexes
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


def test_second_run_does_nothing(run_tiny, tmp_path) -> None:
    run_tiny()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*") if file.is_file()}
    outcome = run_tiny()
    assert (outcome.status, outcome.shards_computed) == ("unchanged", 0)
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*") if file.is_file()}
    changed = {file.relative_to(tmp_path / "store").parts[0] for file in after if before.get(file) != after[file]}
    assert changed <= {".lock", "manifest"}
    assert len(history(tmp_path / "store")) == 1


def test_ruined_model_is_rejected_and_the_old_release_stays_served(
    run_tiny, tmp_path, tiny_models, make_checkpoint
) -> None:
    first = run_tiny()
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


def test_release_without_labels_does_not_replace_a_measured_one(
    run_pipeline, tiny_source, plain_source, tmp_path
) -> None:
    store = tmp_path / "store"
    first = run_pipeline(tiny_source, store)
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
    run_tiny, tmp_path, tiny_models, make_checkpoint
) -> None:
    run_tiny()
    checkpoint = load(make_checkpoint(tmp_path / "everybody.safetensors", strength=1.0))
    names = [f"subject-{number:06d}" for number in range(20)]
    keys = name_hashes(names, checkpoint.card.seen_key)
    save(checkpoint.card, checkpoint.model, tmp_path / "everybody.safetensors", Seen(keys, np.zeros(0, np.int64)))
    outcome = run_tiny(models={**tiny_models.by_mode, "per_sample": str(tmp_path / "everybody.safetensors")})
    assert outcome.status == "rejected"
    assert "fewer than two labelled held-out subjects" in outcome.reason


def test_model_with_unknown_training_subjects_does_not_replace_a_measured_one(
    run_tiny, tmp_path, tiny_models, make_checkpoint
) -> None:
    run_tiny()
    checkpoint = load(make_checkpoint(tmp_path / "silent.safetensors", seed=3))
    save(checkpoint.card, checkpoint.model, tmp_path / "silent.safetensors")
    outcome = run_tiny(models={**tiny_models.by_mode, "per_sample": str(tmp_path / "silent.safetensors")})
    assert outcome.status == "rejected"
    assert "per_sample: leakage cannot be excluded" in outcome.reason
    assert "n/e" in printed(tmp_path / "store")


def test_equal_model_passes_and_is_compared_with_the_served_release(run_tiny, tmp_path, tiny_models) -> None:
    first = run_tiny()
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


def test_new_evaluation_settings_measure_again_and_compute_nothing(run_tiny) -> None:
    run_tiny()
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


def test_releases_show_the_gated_metric_of_each(run_tiny, tmp_path) -> None:
    run_tiny()
    run_tiny(gate={"cell": "all", "metric": "fnmr@1e-2", "tolerance": 1.0})
    lines = [line for line in printed(tmp_path / "store").splitlines() if line.startswith("r0000")]
    assert ["frontal–profile EER" in line.split("promoted")[0] for line in lines] == [True, False]
    assert "all pairs FNMR at own FMR 1%" in lines[1].split("promoted")[0]


def printed(store: Path) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_releases(history(store), as_json=False)
    return text.getvalue()


def test_roll_back_serves_the_old_release_and_later_runs_start_from_there(
    run_tiny, tmp_path, tiny_models, make_checkpoint
) -> None:
    first = run_tiny()
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


def test_prefect_shows_the_modes_the_stages_and_the_report(run_tiny, prefect_server, tmp_path) -> None:
    outcome = run_tiny()
    with temporary_settings({PREFECT_API_URL: prefect_server.url}), get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/latest/filter", json={}).json()
    by_key = {artifact["key"]: artifact for artifact in found}
    assert "per_sample" in by_key["frontalis-modes"]["data"]
    assert outcome.release in by_key["frontalis-modes"]["data"]
    assert outcome.release in by_key["frontalis-report"]["data"]
    stages = history(tmp_path / "store")[0].stages
    assert [one.stage for one in stages] == [
        *("plan", "reweight", "publish", "index raw", "index per_sample", "index batch_stat", "evaluate", "report")
    ]
    assert [one.rows for one in stages[:2]] == [280, 280]
    assert all(f"| {one.stage.replace('_', chr(92) + '_')} |" in by_key["frontalis-stages"]["data"] for one in stages)
    assert outcome.stages == stages


def test_evaluate_measures_a_release_again(run_tiny, tmp_path, prefect_server) -> None:
    outcome = run_tiny()
    with temporary_settings({PREFECT_API_URL: prefect_server.url, PREFECT_LOGGING_TO_API_ENABLED: False}):
        again = evaluate(str(tmp_path / "store"), resamples=0)
        words = ["--quiet", "evaluate", "--store", str(tmp_path / "store"), "--json"]
        typed = CliRunner().invoke(app, words, obj=Command())
        with pytest.raises(SettingsError, match="is not in"):
            evaluate(str(tmp_path / "store"), release="r00009-none")
    assert json.loads(typed.stdout)["resamples"] == outcome.evaluation.resamples == 0
    assert again.populations["held_out"].modes == outcome.evaluation.populations["held_out"].modes


def test_neither_and_both_ways_to_give_settings_are_refused(prefect_server, tiny_models, tmp_path) -> None:
    settings = pipeline(source=str(tmp_path), store=str(tmp_path), models=tiny_models.by_mode)
    with temporary_settings({PREFECT_API_URL: prefect_server.url, PREFECT_LOGGING_TO_API_ENABLED: False}):
        with pytest.raises(SettingsError, match="either config"):
            reprocess()
        with pytest.raises(SettingsError, match="either config"):
            reprocess(config="x.toml", settings=settings)
