"""Small files that unpack to gigabytes, and how much memory a process takes to read them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

DIM = 32


def _hostile(path: Path, kind: str) -> None:
    """Write a few kilobytes or megabytes of Parquet that unpack to more than 2 GB; `harmless` does not."""
    rows, million = 8192, 1_000_000
    vectors = np.random.default_rng(0).standard_normal(rows * DIM).astype(np.float32)
    ids = pa.array([f"i{row}" for row in range(rows)])
    columns = {"id": ids, "embedding": pa.FixedSizeListArray.from_arrays(vectors, DIM), "subject": ids}
    options: dict[str, object] = {"compression": "zstd", "store_schema": False}

    def repeated(column: pa.Array, times: int) -> pa.ChunkedArray:
        return pa.chunked_array([column] * times)

    if kind in ("ids", "late ids", "subjects"):
        before = 5000 if kind == "late ids" else 0
        words = [*ids[:before].to_pylist(), "x" * million]
        codes = pa.array(np.minimum(np.arange(rows), before), pa.int32())
        columns["subject" if kind == "subjects" else "id"] = pa.DictionaryArray.from_arrays(codes, words)
    elif kind in ("ids in pages", "ids with one beginning"):
        columns = {name: column[:2560] for name, column in columns.items()}
        columns["id"] = repeated(pa.array([f"{'x' * million}{row}" for row in range(40)]), 64)
        encoding = "PLAIN" if kind == "ids in pages" else "DELTA_BYTE_ARRAY"
        options |= {"use_dictionary": False, "column_encoding": {"id": encoding}, "write_statistics": False}
    elif kind != "harmless":
        columns = {name: column[:640] for name, column in columns.items()}
        lists = pa.ListArray.from_arrays(range(0, 17 * million, million), np.zeros(16 * million, np.float32))
        if kind == "null lists of fixed size":
            lists = pa.nulls(16, pa.list_(pa.float32(), million))
            options["store_schema"] = True
        columns["embedding"] = repeated(lists, 40)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = kind == "lists in many row groups"
    pq.write_table(pa.table(columns), path, row_group_size=16 if small else rows, write_batch_size=64, **options)
    assert path.stat().st_size < 4e6, path.stat().st_size


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], None]:
    """`hostile(path, kind)` writes a small file that unpacks to gigabytes; `test_blocks.py` lists the kinds.

    To encode gigabytes takes seconds, so each kind is made once for all workers and copied.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "hostile"

    def copy(path: Path, kind: str) -> None:
        original = folder / kind.replace(" ", "-") / "odd.parquet"
        folder.mkdir(exist_ok=True)
        with FileLock(folder / f"{original.parent.name}.lock"):
            if not original.exists():
                _hostile(original, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(original, path)

    return copy


@pytest.fixture(scope="session")
def memory_grown() -> Callable[..., tuple[float, list[str]]]:
    """`memory_grown(code, harmless, hostile)` runs `read(path)` of the code over both files in a new process.

    Gives by how many bytes the peak of memory grew over the second, and what `read` returned for each.
    """

    def run(code: str, *paths: Path) -> tuple[float, list[str]]:
        words = [sys.executable, "-c", code + _MEASURE, *map(str, paths)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        (before, _), *after = found = json.loads(done.stdout)
        return after[-1][0] - before, [said for _, said in found]

    return run


_MEASURE = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
found = []
for path in sys.argv[1:]:
    said = str(read(path))
    status = open("/proc/self/status").read()
    found.append((int(status.split("VmHWM:")[1].split()[0]) * 1024, said))
print(json.dumps(found))
"""
