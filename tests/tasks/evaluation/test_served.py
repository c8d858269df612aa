"""The served release's features of evaluated rows: those its own files hold, whatever moved since."""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from schemas.metrics import RAW
from schemas.settings import EvaluationSettings
from storage.features import features_table
from storage.location import Location
from storage.tables import Snapshot
from tasks.evaluation import served
from tasks.evaluation.rows import files_of, read_labelled, read_subject_index
from tasks.evaluation.served import served_features

MODES = ["per_sample", "batch_stat"]


@pytest.fixture
def source(tmp_path: Path, tiny_source: Path) -> Path:
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


@pytest.fixture
def publish(tmp_path: Path, source: Path, run_stages, pipeline_of):
    return lambda **settings: run_stages(pipeline_of(source, tmp_path / "store", **settings)).published.features


def compare(store: Location, before: Snapshot, after: Snapshot, step: int = 3) -> tuple[list[str], list[str]]:
    """Check the features of every third row against polars; return the ids evaluated, and those found."""
    labelled = read_subject_index(store, after)
    rows = np.arange(1, len(labelled), step)
    read = read_labelled(store, after, labelled, rows, [RAW, *MODES], EvaluationSettings())
    common, found = served_features(store, after, before, labelled, rows, read, MODES)
    ids = [read.ids[row] for row in common]
    for mode in MODES:
        old = pl.concat(
            pl.read_parquet(f"{features_table(store).place.path}/{file.path}", hive_partitioning=False)
            for file in files_of(before, mode).values()
        )
        expected = pl.DataFrame({"id": ids}).join(old, on="id", how="left", maintain_order="left")
        np.testing.assert_array_equal(found[mode], np.stack(expected["front"].to_list()))
    return read.ids, ids


def test_nothing_is_read_where_nothing_changed(publish, tmp_path, monkeypatch) -> None:
    features = publish()
    monkeypatch.setattr(served, "rows_at", None)
    monkeypatch.setattr(served, "read_rows", None)
    evaluated, found = compare(Location(str(tmp_path / "store")), features, features)
    assert found == evaluated


def test_rows_that_changed_moved_and_came(publish, source, tmp_path) -> None:
    before = publish()
    first, second, third = sorted(source.iterdir())
    rows = pl.read_parquet(first)
    turned = rows.with_columns(pl.Series("embedding", rows["embedding"].reverse()))
    turned.reverse().tail(60).write_parquet(source / "moved.parquet")
    first.unlink()
    fresh = pl.read_parquet(second).with_columns(pl.format("new-{}", "id").alias("id"))
    pl.concat([pl.read_parquet(second), fresh]).write_parquet(second)
    third.rename(source / "another.parquet")
    evaluated, found = compare(Location(str(tmp_path / "store")), before, publish())
    assert found == [one for one in evaluated if not one.startswith("new-")]
    assert len(found) < len(evaluated)


def test_another_model_for_the_same_rows(publish, tmp_path, make_checkpoint, tiny_models) -> None:
    before = publish()
    other = make_checkpoint(tmp_path / "other.safetensors", seed=3)
    after = publish(models={**tiny_models.by_mode, "per_sample": str(other)})
    evaluated, found = compare(Location(str(tmp_path / "store")), before, after)
    assert found == evaluated
