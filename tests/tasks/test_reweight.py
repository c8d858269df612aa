"""Features are a function of the rows alone, bad rows are counted, and memory stays bounded."""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.architectures import build
from models.checkpoint import save
from schemas.errors import BadShardError
from schemas.features import BLOCK_ROWS
from schemas.models import ModelCard
from tasks.plan import make_plan, prepare_models
from tasks.reweight import ReweightSpec, one_thread_each, reweight_group

D = 32


def table_of(matrix: np.ndarray, **columns: object) -> pa.Table:
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
    return pa.table({"id": [f"i{row}" for row in range(len(matrix))], "embedding": embedding, **columns})


def vectors(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, D)).astype(np.float32)


def planned(settings):
    models = prepare_models(settings)
    plan = make_plan(settings, models)
    return plan, ReweightSpec.of(settings, models, plan.schema)


def bytes_by_mode(store: Path) -> dict[str, bytes]:
    files = [file for file in (store / "features").rglob("*.parquet") if "mode=" in str(file)]
    return {file.parent.parent.name: file.read_bytes() for file in files}


def fronts(store: Path, mode: str) -> np.ndarray:
    [file] = (store / "features" / f"mode={mode}").rglob("*.parquet")
    return np.array(pq.ParquetFile(file).read()["front"].to_pylist(), np.float32)


FORMS = {
    "large row groups": {"row_group_size": 5_000},
    "small row groups": {"row_group_size": 777},
    "zstd and dictionaries": {"row_group_size": 2_000, "compression": "zstd", "use_dictionary": True},
    "pages of version 2": {"row_group_size": 9_001, "data_page_version": "2.0", "data_page_size": 10_000},
}


@pytest.mark.parametrize("reweight", [{}, {"statistic": "batch", "batch_size": 1_000}, {"branches": True}], ids=str)
def test_layout_of_the_file_never_shows(reweight: dict[str, object], tmp_path: Path, run_stages, pipeline_of) -> None:
    rows = 2 * BLOCK_ROWS + 809
    matrix = vectors(rows)
    matrix[[0, BLOCK_ROWS - 1, BLOCK_ROWS, rows - 1]] = 0
    found = {}
    for name, options in FORMS.items():
        source, store = tmp_path / name / "source", tmp_path / name / "store"
        source.mkdir(parents=True)
        pq.write_table(table_of(matrix), source / "a.parquet", **options)
        _, [result], _ = run_stages(pipeline_of(source, store, reweight=reweight))
        assert result.quarantined == {"zero_norm": 4}
        found[name] = bytes_by_mode(store)
    first = found.pop("large row groups")
    assert set(first) == {"mode=raw", "mode=per_sample", "mode=batch_stat"}
    for name, other in found.items():
        assert other == first, name


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32(), D),
        pa.list_(pa.float32()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float64(), D),
        pa.binary(4 * D),
        pa.fixed_shape_tensor(pa.float32(), [D]),
    ],
    ids=str,
)
def test_form_of_the_embedding_never_shows(kind: pa.DataType, tmp_path: Path, run_stages, pipeline_of) -> None:
    matrix = vectors(50)
    if pa.types.is_fixed_size_binary(kind):
        column = pa.array([row.tobytes() for row in matrix], kind)
    elif isinstance(kind, pa.FixedShapeTensorType):
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(matrix)
    else:
        column = pa.array(matrix.tolist(), kind)
    for folder, table in (("plain", table_of(matrix)), ("other", table_of(matrix).set_column(1, "embedding", column))):
        (tmp_path / folder / "source").mkdir(parents=True)
        pq.write_table(table, tmp_path / folder / "source" / "a.parquet")
        run_stages(pipeline_of(tmp_path / folder / "source", tmp_path / folder / "store"))
    assert bytes_by_mode(tmp_path / "other" / "store") == bytes_by_mode(tmp_path / "plain" / "store")


def test_workers_and_retries_never_show(tmp_path: Path, pipeline_of) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for shard in range(6):
        pq.write_table(table_of(vectors(300, shard)).set_column(
            0, "id", pa.array([f"{shard}-{row}" for row in range(300)])), source / f"{shard}.parquet")  # fmt: skip
    written = []
    for name, workers in (("one", 1), ("four", 4)):
        settings = pipeline_of(source, tmp_path / name, reweight={"group_rows": 1})
        plan, spec = planned(settings)
        assert len(plan.groups) == 6
        with one_thread_each(workers), ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda group, spec=spec: reweight_group(group, spec), plan.groups))
        place = tmp_path / name / "features"
        once = {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*.parquet")}
        again = reweight_group(plan.work[:2], spec)
        assert {file.path for result in again for file in result.files} <= set(once)
        assert {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*.parquet")} == once
        written.append(once)
    assert len(written[0]) == 18
    assert written[0] == written[1]


def test_batch_statistic_is_the_mean_over_consecutive_rows_of_the_shard(
    tmp_path: Path, run_stages, pipeline_of
) -> None:
    """The published definition in NumPy: s = mean of the batch, weights = sigmoid(W₂ relu(W₁ s)), out = x · weights."""
    torch.manual_seed(3)
    arguments = {"channels": D, "reduction": 4, "use_batch_stat": True}
    model = build("se", arguments)
    card = ModelCard(architecture="se", arguments=arguments, mode="batch_stat", embedding_dim=D)
    save(card, model, tmp_path / "se.safetensors")
    matrix = vectors(43, 5)
    matrix[17] = np.nan
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(table_of(matrix), source / "a.parquet", row_group_size=5)

    run_stages(
        pipeline_of(
            source,
            tmp_path / "store",
            models={"batch_stat": str(tmp_path / "se.safetensors")},
            reweight={"statistic": "batch", "batch_size": 16},
        )
    )

    first, second = (model.fc[at].weight.detach().double().numpy() for at in (0, 2))
    expected = []
    for start in (0, 16, 32):
        batch = matrix[start : start + 16].astype(np.float64)
        batch = batch[np.isfinite(batch).all(axis=1)]
        batch /= np.linalg.norm(batch, axis=1, keepdims=True)
        hidden = np.maximum(first @ batch.mean(axis=0), 0)
        expected.append(batch / (1 + np.exp(-(second @ hidden))))
    np.testing.assert_allclose(fronts(tmp_path / "store", "batch_stat"), np.concatenate(expected), atol=1e-6)


def test_raw_is_the_embedding_and_labels_pass_through(tmp_path: Path, run_stages, pipeline_of) -> None:
    matrix = vectors(5)
    labels = {
        "subject": pa.array(["a", None, "b", "b", "c"]).dictionary_encode(),
        "pose": ["frontal", "profile", None, "frontal", "frontal"],
        "yaw": pa.array([1.5, None, 200.0, -90.0, 0.0], pa.float64()),
        "note": pa.array([1, 2, None, 4, 5], pa.uint16()),
        "ignored": [0] * 5,
    }
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(table_of(matrix, **labels), source / "a.parquet")
    run_stages(pipeline_of(source, tmp_path / "store", columns={"keep": ["note"]}))
    for mode in ("raw", "per_sample"):
        [file] = (tmp_path / "store" / "features" / f"mode={mode}").rglob("*.parquet")
        stored = pq.ParquetFile(file).read()
        assert stored["id"].to_pylist() == [f"i{row}" for row in range(5)]
        assert stored["subject"].to_pylist() == ["a", None, "b", "b", "c"]
        assert stored["pose"].to_pylist() == labels["pose"]
        assert stored["yaw"].to_pylist() == [1.5, None, None, -90.0, 0.0]
        assert stored["note"].to_pylist() == [1, 2, None, 4, 5]
        assert stored["pitch"].null_count == 5
        assert "ignored" not in stored.column_names
    np.testing.assert_array_equal(fronts(tmp_path / "store", "raw"), matrix)


def test_quarantine_names_the_row(tmp_path: Path, run_stages, pipeline_of) -> None:
    rows = BLOCK_ROWS + 10
    matrix = vectors(rows)
    matrix[BLOCK_ROWS + 2] = np.inf
    table = table_of(matrix, subject=[f"s{row % 7}" for row in range(rows)])
    ids: list[str | None] = table["id"].to_pylist()
    ids[1], ids[BLOCK_ROWS], ids[BLOCK_ROWS + 5] = "i0", None, "i7"
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(table.set_column(0, "id", pa.array(ids)), source / "a.parquet")
    _, [result], published = run_stages(pipeline_of(source, tmp_path / "store"))
    [file] = (tmp_path / "store" / "quarantine").rglob("*/*.parquet")
    assert pq.ParquetFile(file).read().to_pylist() == [
        {"row": 1, "id": "i0", "subject": "s1", "reason": "duplicate_id"},
        {"row": BLOCK_ROWS, "id": None, "subject": f"s{BLOCK_ROWS % 7}", "reason": "null_id"},
        {"row": BLOCK_ROWS + 2, "id": f"i{BLOCK_ROWS + 2}", "subject": f"s{(BLOCK_ROWS + 2) % 7}",
         "reason": "not_finite"},
        {"row": BLOCK_ROWS + 5, "id": "i7", "subject": f"s{(BLOCK_ROWS + 5) % 7}", "reason": "duplicate_id"},
    ]  # fmt: skip
    assert result.quarantined == Counter(duplicate_id=2, null_id=1, not_finite=1)
    assert published.data.rows_features == rows - 4


def test_shard_rewritten_after_the_plan_leaves_no_file(tmp_path: Path, pipeline_of) -> None:
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(table_of(vectors(20)), source / "a.parquet")
    plan, spec = planned(pipeline_of(source, tmp_path / "store"))
    pq.write_table(table_of(vectors(20, seed=9)), source / "a.parquet")
    [result] = reweight_group(plan.work, spec)
    assert result.fault is not None
    assert "was rewritten meanwhile; run again" in result.fault.reason
    assert not result.files
    assert not list((tmp_path / "store" / "features").rglob("mode=*/*/*"))


def test_one_bad_shard_does_not_stop_its_group_unless_it_should(tmp_path: Path, pipeline_of) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for shard in "abc":
        table = table_of(vectors(20, ord(shard)))
        pq.write_table(table.set_column(0, "id", pa.array([f"{shard}{row}" for row in range(20)])),
                       source / f"{shard}.parquet")  # fmt: skip
    for fail in (False, True):
        reweight = {"on_bad_rows": "fail" if fail else "quarantine"}
        plan, spec = planned(pipeline_of(source, tmp_path / f"store-{fail}", reweight=reweight))
        (source / "b.parquet").write_bytes((source / "b.parquet").read_bytes()[:-9])
        if fail:
            with pytest.raises(BadShardError, match="shard b"):
                reweight_group(plan.work, spec)
        else:
            results = reweight_group(plan.work, spec)
            assert [result.shard for result in results if result.fault] == ["b"]
            assert [len(result.files) for result in results] == [3, 0, 3]
            pq.write_table(table_of(vectors(20, 1)).set_column(0, "id", pa.array([f"b{row}" for row in range(20)])),
                           source / "b.parquet")  # fmt: skip


MEASURE = """
import json, sys
import torch
from schemas.settings import pipeline
from tasks.plan import make_plan, prepare_models
from tasks.reweight import ReweightSpec, reweight_group
torch.set_num_threads(1)
small, large, store, model = sys.argv[1:]
def peak(source, name):
    settings = pipeline(source=source, store=store + name, models={"per_sample": model})
    models = prepare_models(settings)
    plan = make_plan(settings, models)
    [result] = reweight_group(plan.work, ReweightSpec.of(settings, models, plan.schema))
    assert result.fault is None, result.fault
    status = open("/proc/self/status").read()  # ru_maxrss would begin at the peak of the process that started this one
    return int(status.split("VmHWM:")[1].split()[0]) * 1024, result.files[0].rows
before, _ = peak(small, "small")
after, rows = peak(large, "large")
print(json.dumps({"grown": after - before, "rows": rows}))
"""


@pytest.mark.e2e
def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    """A row group of 512 MB adds less than 200 MB to what a shard of two blocks takes."""
    dim, rows = 512, 250_000
    arguments = {"channels": dim, "reduction": 64}
    card = ModelCard(architecture="se", arguments=arguments, mode="per_sample", embedding_dim=dim)
    save(card, build("se", arguments), tmp_path / "se.safetensors")
    matrix = np.tile(np.random.default_rng(0).standard_normal((500, dim)).astype(np.float32), (rows // 500, 1))
    for name, count in (("small", 2 * BLOCK_ROWS), ("large", rows)):
        (tmp_path / name).mkdir()
        pq.write_table(table_of(matrix[:count]), tmp_path / name / "a.parquet", row_group_size=rows,
                       compression="none", use_dictionary=False, write_statistics=False)  # fmt: skip
    assert pq.ParquetFile(tmp_path / "large" / "a.parquet").num_row_groups == 1
    words = [str(tmp_path / name) for name in ("small", "large", "store-", "se.safetensors")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["rows"] == rows
    assert found["grown"] < 200e6, found  # measured 95 MB; 1,147 MB where whole row groups are read
