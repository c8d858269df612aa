"""A store does not grow with the number of runs: what `[retention]` keeps is all there is.

FRONTALIS_RUNS says how many runs are simulated (40 by default; `make torture` 400): a shard changes, and the stages run
without Prefect and without an evaluation.
"""

import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.index import IndexSettings
from schemas.releases import Release
from schemas.reports import DataQuality, GateDecision
from schemas.settings import RetentionSettings
from storage.features import features_table
from storage.location import Location
from storage.releases import Releases
from tasks.index import index_mode
from tasks.maintenance.vacuum import apply_retention
from tasks.plan import prepare_models

RUNS = int(os.environ.get("FRONTALIS_RUNS", "40"))
KEEP = 3
DIM = 32


@pytest.mark.e2e
@pytest.mark.timeout(60 + 3 * RUNS)
def test_disk_use_stays_bounded(tmp_path, run_stages, pipeline_of, monkeypatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # most of the time of such small runs
    source, place = tmp_path / "source", Location(str(tmp_path / "store"))
    source.mkdir()
    for number in range(3):
        write_shard(source / f"part-{number}.parquet", number)
    settings = pipeline_of(source, place.uri)
    models, history, used = prepare_models(settings), Releases(place), []
    for run in range(RUNS):
        write_shard(source / "part-0.parquet", 1000 + run)
        publish_release(history, run_stages(settings).published, models)
        apply_retention(place, RetentionSettings(keep=KEEP))
        used.append(disk_use(Path(place.path)))
        kept = [release for release in history.all() if not release.unusable]
        assert len(kept) == min(KEEP, run + 1)
        for release in kept:
            files = features_table(place).snapshot(release.features_version).files
            assert len(files) == 9
            assert all((place / "features" / path).size() == file.size for path, file in files.items())
            assert all((place / index.path).size() == index.size for index in release.indexes.values())
    files, sizes = zip(*used, strict=True)
    settled = used[RUNS // 2 :]
    print(f"{RUNS} runs: files {min(files)}-{max(files)}, bytes {sizes[RUNS // 2]:,} then {sizes[-1]:,}")
    assert max(count for count, _ in settled) <= 1.1 * max(files[: RUNS // 2])
    # A release that was removed stays in the history: some hundred bytes each.
    assert sizes[-1] - sizes[RUNS // 2] <= 3000 * (RUNS - RUNS // 2)


def test_each_run_removes_what_retention_does_not_keep(plain_source, run_pipeline, make_checkpoint, tmp_path) -> None:
    for number, keep in enumerate((1, 0, 1)):
        model = make_checkpoint(tmp_path / f"{number}.safetensors", seed=number)
        chosen = {"models": {"per_sample": str(model)}, "retention": {"keep": keep}}
        assert run_pipeline(plain_source, tmp_path / "store", **chosen).status == "promoted"
        kept = [not old.vacuumed for old in Releases(Location(str(tmp_path / "store"))).all()]
        assert kept == [[True], [True, True], [False, False, True]][number]
    assert len(list((tmp_path / "store/features").glob("mode=per_sample/*/*.parquet"))) == 3


def write_shard(path: Path, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((20, DIM)).astype(np.float32)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), DIM)
    pq.write_table(pa.table({"id": [f"{path.stem}-{row}" for row in range(20)], "embedding": embedding}), path)


def publish_release(history: Releases, published, models) -> None:
    earlier = history.all()
    number = len(earlier) + 1
    name = f"r{number:05d}-{number:08x}"
    modes = ("raw", *models)
    indexes = {
        mode: index_mode(history.store, name, mode, published.features, IndexSettings(factory="Flat"), None)
        for mode in modes
    }
    release = Release(
        release=name,
        number=number,
        created=datetime.now(UTC),
        content=f"{number:032x}",
        source="",
        features_version=published.features.version,
        quarantine_version=None,
        models=models,
        indexes=indexes,
        data=DataQuality(shards=3, rows_read=60, rows_features=60, quarantined={}, forgotten=0, bad_shards=[]),
        gate=GateDecision(promoted=True, reason=""),
        gated={},
        gated_name="",
        report=None,
    )
    history.record(release, earlier)


def disk_use(folder: Path) -> tuple[int, int]:
    """Return the number of files below a folder, and their bytes."""
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return len(sizes), sum(sizes)
