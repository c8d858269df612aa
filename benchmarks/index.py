"""Seconds, memory, queries a second and recall of index kinds, side by side on synthetic rows.

    python -m benchmarks.index [--rows 500000] [--dim 512] [--recall 0.98] [--kind FACTORY …]

Each kind is built in a process of its own, so that its peak memory is its own.
The first kind is the one that "auto" chose until fast-scan codes, with its training of 128 rows a list and 10
iterations, and is given an eighth of the lists to visit. The others are tuned to the wanted recall@10.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np

from schemas.index import IndexSettings
from storage.vectors import index as vectors_index
from storage.vectors import training
from storage.vectors.exact import unit_rows
from storage.vectors.index import build, choose_factory
from storage.vectors.recall import audit_recall
from storage.vectors.training import Batch
from tasks.synthetic.population import SyntheticPopulation

PER_SUBJECT = 14
BATCH = 16_384
BEFORE_TRAINING = {"ROWS_PER_LIST": 128, "ITERATIONS": 10}


@dataclass(frozen=True)
class Line:
    """One kind: seconds to build, CPU seconds, seconds of recall and tuning, queries a second, peak memory."""

    kind: str
    build: float
    cpu: float
    audit: float
    nprobe: int
    queries: float
    recall_at_1: float
    recall_at_10: float
    peak_gb: float
    size_gb: float


def main(arguments: Sequence[str] | None = None) -> list[Line]:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--recall", type=float, default=0.98)
    parser.add_argument("--kind", nargs="+", help="factory strings; the former and the present auto by default")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        folder, kind, before = json.loads(options.one)
        print(json.dumps(asdict(measure(Path(folder), kind, before, options))))
        return []
    settings = IndexSettings(memory_budget_gb=1000)
    former = f"IVF{2 ** int(np.log2(min(4 * options.rows**0.5, options.rows / 128)))},Flat"
    present = choose_factory(max(options.rows, vectors_index.EXACT_ROWS + 1), options.dim, settings)
    if options.rows < vectors_index.EXACT_ROWS:  # too few for "auto", and for its lists
        present = re.sub(r"IVF\d+", former.partition(",")[0], present)
    kinds = [(kind, False) for kind in options.kind or [present]]
    print(f"{options.rows:,} rows of {options.dim} numbers, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| kind | build s | CPU s | recall s | lists visited | queries/s | recall@1 | recall@10 | peak GB | size GB |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        make_rows(Path(folder), options.rows, options.dim)
        for kind, before in [(former, True), *kinds]:
            own = ["--rows", str(options.rows), "--dim", str(options.dim), "--recall", str(options.recall)]
            command = [sys.executable, "-m", "benchmarks.index", *own, "--one", json.dumps([folder, kind, before])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            line = Line(**json.loads(done.stdout))
            print(
                f"| {line.kind} | {line.build:.1f} | {line.cpu:.1f} | {line.audit:.1f} | {line.nprobe} "
                f"| {line.queries:,.0f} | {line.recall_at_1:.3f} | {line.recall_at_10:.3f} | {line.peak_gb:.2f} "
                f"| {line.size_gb:.2f} |",
                flush=True,
            )
            lines.append(line)
    return lines


def make_rows(folder: Path, rows: int, dim: int) -> None:
    """Write `rows.f32`: photographs of subjects, ten frontal and four profiles each."""
    population = SyntheticPopulation.draw(dim, 0)
    file = np.memmap(folder / "rows.f32", np.float32, "w+", shape=(rows, dim))
    step = 18
    for first in range(0, -(-rows // PER_SUBJECT), step):
        found = population.photograph([np.random.default_rng([0, first + n]) for n in range(step)], 10, 4).embedding
        at = first * PER_SUBJECT
        file[at : at + len(found)] = found[: rows - at]
    file.flush()


def measure(folder: Path, kind: str, before: bool, options: argparse.Namespace) -> Line:
    """Build one kind and search it."""
    for name, value in BEFORE_TRAINING.items() if before else ():
        setattr(training, name, value)
        setattr(vectors_index, name, value)

    def batches() -> Iterator[Batch]:
        # read, not mapped: mapped pages would count as memory
        with (folder / "rows.f32").open("rb") as file:
            for at in range(0, options.rows, BATCH):
                part = np.fromfile(file, np.float32, BATCH * options.dim).reshape(-1, options.dim)
                yield np.arange(at, at + len(part)), part

    queries, asked = [], []
    share = -(-384 * BATCH // options.rows)
    for _, part in batches():
        unit = unit_rows(part, options.dim)
        between = 2 * unit[:-1] + unit[1:]
        queries.append(between[np.linspace(0, len(between) - 1, min(share, len(between))).astype(int)])
        asked.append(between[:: max(1, options.rows // 4096)])
    start, cpu = time.perf_counter(), time.process_time()
    settings = IndexSettings(factory=kind, recall=options.recall)
    index = build(batches, options.rows, options.dim, settings)
    built, built_cpu = time.perf_counter() - start, time.process_time() - cpu
    start = time.perf_counter()
    recall = audit_recall(index, batches, np.concatenate(queries), None if before else options.recall)
    audited = time.perf_counter() - start
    start = time.perf_counter()
    index.search(np.concatenate(asked), 10)
    searched = sum(map(len, asked)) / (time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with (folder / "index.faiss").open("wb") as file:
        size = index.write(file).size
    nprobe = faiss.extract_index_ivf(index._index).nprobe
    return Line(kind, built, built_cpu, audited, nprobe, searched, recall.at_1, recall.at_10, peak / 1e9, size / 1e9)


if __name__ == "__main__":
    main()
