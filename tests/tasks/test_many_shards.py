"""A source of very many small files: time and memory grow with their number, and no faster.

FRONTALIS_SHARDS says how many (60 by default; `make torture` 10,000). With `-s` the seconds and the memory are shown.
"""

import os
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.features import features_table
from storage.location import Location
from tasks.maintenance.verify import check

SHARDS = int(os.environ.get("FRONTALIS_SHARDS", "60"))
ROWS = 4
DIM = 32
MEGABYTES = 300  # of a run, whatever its size
KILOBYTES_A_SHARD = 60  # 23 measured


@pytest.fixture
def source(tmp_path: Path) -> Path:
    random, folder = np.random.default_rng(0), tmp_path / "source"
    folder.mkdir()
    for number in range(SHARDS):
        matrix = random.standard_normal((ROWS, DIM)).astype(np.float32)
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), DIM)
        ids = [f"{number:06d}-{row}" for row in range(ROWS)]
        pq.write_table(pa.table({"id": ids, "embedding": embedding}), folder / f"part-{number:06d}.parquet")
    return folder


@pytest.mark.timeout(120 + SHARDS // 2)
def test_many_small_files(source: Path, run_pipeline, tiny_models, tmp_path: Path) -> None:
    store, models = tmp_path / "store", {"per_sample": str(tiny_models.per_sample)}
    open_before, peak_before = open_files(), peak_bytes()
    outcomes = []
    for change in ("all new", "nothing", "one file"):
        if change == "one file":
            file = source / f"part-{SHARDS // 2:06d}.parquet"
            pq.write_table(pq.read_table(file).slice(1), file)
        started = time.monotonic()
        outcomes.append(run_pipeline(source, store, models=models))
        print(f"{SHARDS} shards, {change}: {time.monotonic() - started:.0f} s, peak {peak_bytes() / 1e6:.0f} MB")
    assert [one.shards_computed for one in outcomes] == [SHARDS, 0, 1]
    assert [one.status for one in outcomes] == ["promoted", "unchanged", "promoted"]
    assert outcomes[-1].data.rows_features == ROWS * SHARDS - 1
    assert len(features_table(Location(str(store))).snapshot().files) == 2 * SHARDS
    assert open_files() <= open_before + 40, "whatever a shard opens is closed again"
    assert peak_bytes() - peak_before <= 1e6 * MEGABYTES + 1e3 * KILOBYTES_A_SHARD * SHARDS
    assert check(str(store)).problems == []


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
