"""The whole night in a real flow: what is served, what is kept back, what is done again, what Prefect shows."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from flows.evaluate import evaluate
from flows.reprocess import reprocess
from flows.rollback import roll_back
from schemas.errors import SettingsError
from schemas.settings import pipeline
from storage.location import Location
from storage.releases import Releases
from tasks.query import answer


@pytest.fixture
def night(run_pipeline, tiny_source, tmp_path):
    """`night(**settings)` runs the flow over the tiny source into one store."""
    return lambda **settings: run_pipeline(tiny_source, tmp_path / "store", **settings)


def history(store: Path):
    return Releases(Location(str(store))).all()


def test_first_night_publishes_everything(night, tmp_path) -> None:
    outcome = night()
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


def test_second_night_does_nothing(night, tmp_path) -> None:
    night()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*") if file.is_file()}
    outcome = night()
    assert (outcome.status, outcome.shards_computed) == ("unchanged", 0)
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*") if file.is_file()}
    changed = {file.relative_to(tmp_path / "store").parts[0] for file in after if before.get(file) != after[file]}
    assert changed <= {".lock", "census"}
    assert len(history(tmp_path / "store")) == 1


def test_ruined_model_is_kept_back_and_the_old_release_goes_on_being_served(
    night, tmp_path, tiny_models, make_checkpoint
) -> None:
    first = night()
    ruined = make_checkpoint(tmp_path / "ruined.safetensors", strength=1.0)
    outcome = night(
        models={**tiny_models.by_mode, "per_sample": str(ruined)}, evaluation={"resamples": 100}, gate={"cell": "all"}
    )
    assert outcome.status == "kept back"
    assert "per_sample" in outcome.reason
    assert "95% interval" in outcome.reason
    old, new = history(tmp_path / "store")
    assert old.serving
    assert not new.serving
    assert old.release == first.release
    assert answer(str(tmp_path / "store"), "per_sample", ids=["000000-000"], k=1).release == first.release
    assert (tmp_path / "store" / new.report).exists()
    assert answer(str(tmp_path / "store"), "per_sample", ids=["000000-000"], k=1, release=new.release).results


def test_equal_model_passes_and_is_compared_with_the_served_release(night, tmp_path, tiny_models) -> None:
    first = night()
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tiny_models.per_sample, other / "again.safetensors")
    outcome = night(
        models={**tiny_models.by_mode, "per_sample": str(other / "again.safetensors")},
        evaluation={"resamples": 100},
    )
    assert outcome.status == "promoted"
    assert outcome.shards_computed == 0  # the same bytes under another name are the same model
    assert first.release in outcome.reason


def test_new_evaluation_settings_measure_again_and_compute_nothing(night) -> None:
    night()
    outcome = night(evaluation={"resamples": 50})
    assert (outcome.status, outcome.shards_computed) == ("promoted", 0)


def test_roll_back_serves_the_old_release_and_a_later_night_goes_on_from_there(
    night, tmp_path, tiny_models, make_checkpoint
) -> None:
    first = night()
    other = make_checkpoint(tmp_path / "other.safetensors", seed=5)
    second = night(models={**tiny_models.by_mode, "per_sample": str(other)}, gate={"tolerance": 1.0})
    store = str(tmp_path / "store")
    assert answer(store, "per_sample", ids=["000000-000"], k=1).release == second.release
    roll_back(store, first.release)
    assert answer(store, "per_sample", ids=["000000-000"], k=1).release == first.release
    third = night()
    assert third.status == "promoted"
    assert (third.shards_computed, third.shards_reused) == (0, 3)  # the files of the first night still lie there
    assert [release.serving for release in history(tmp_path / "store")] == [False, False, True]


def test_prefect_shows_the_table_of_modes_and_the_report(night, prefect_server) -> None:
    outcome = night()
    with temporary_settings({PREFECT_API_URL: prefect_server.url}), get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/latest/filter", json={}).json()
    by_key = {artifact["key"]: artifact for artifact in found}
    assert "per_sample" in by_key["frontalis-modes"]["data"]
    assert outcome.release in by_key["frontalis-modes"]["data"]
    assert outcome.release in by_key["frontalis-report"]["data"]


def test_evaluate_measures_a_release_again(night, tmp_path, prefect_server) -> None:
    outcome = night()
    with temporary_settings({PREFECT_API_URL: prefect_server.url, PREFECT_LOGGING_TO_API_ENABLED: False}):
        again = evaluate(str(tmp_path / "store"), resamples=0)
        with pytest.raises(SettingsError, match="is not in"):
            evaluate(str(tmp_path / "store"), release="r00009-none")
    assert again.populations["held_out"].modes == outcome.evaluation.populations["held_out"].modes


def test_neither_and_both_ways_to_give_settings_are_refused(prefect_server, tiny_models, tmp_path) -> None:
    settings = pipeline(source=str(tmp_path), store=str(tmp_path), models=tiny_models.by_mode)
    with temporary_settings({PREFECT_API_URL: prefect_server.url, PREFECT_LOGGING_TO_API_ENABLED: False}):
        with pytest.raises(SettingsError, match="either config"):
            reprocess()
        with pytest.raises(SettingsError, match="either config"):
            reprocess(config="x.toml", settings=settings)
