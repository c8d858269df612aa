"""Queries a second and waiting times of `frontalis serve` on loopback, beside a bare FAISS loop and a naive handler.

    python -m benchmarks.serve [--rows 50000] [--dim 256] [--seconds 4]

One store of synthetic rows with two releases, made here. Every client sends one query, a vector, and waits for the
answer before it sends the next. The naive service calls `open_store(…).index("raw").search` in a FastAPI handler, one
query a call. Last come batches of 256 in a `.npy` file, and requests during which releases are rolled back and served
again, and the store is vacuumed; any error or answer of two releases ends the benchmark.
"""

import argparse
import asyncio
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import frontalis
from benchmarks.incremental import model
from schemas.settings import pipeline
from storage.location import Location
from storage.releases import Releases
from tasks.maintenance.rollback import roll_back
from tasks.maintenance.vacuum import clean
from tasks.query.opened import open_release
from tasks.reprocess import reprocess
from tasks.synthetic.shards import synthesize

CLIENTS = (1, 8, 32)
PER_SUBJECT = 10
BATCH = 256
K = 10


@dataclass(frozen=True)
class Line:
    """Queries a second, and how long a request waited: median and 99th percentile, in milliseconds."""

    what: str
    clients: int
    queries: float
    p50: float
    p99: float
    load: float


def main(arguments: Sequence[str] | None = None) -> list[Line]:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each line")
    parser.add_argument("--naive", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.naive:
        serve_naively(options.naive)
        return []
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name), options.rows, options.dim)
        queries = np.random.default_rng(0).standard_normal((1024, options.dim), np.float32)
        lines += [
            bare(store, queries[:, None], options.seconds),
            bare(store, queries.reshape(-1, CLIENTS[-1], options.dim), options.seconds),
            bare(store, queries.reshape(-1, BATCH, options.dim), options.seconds),
        ]
        bodies = [json.dumps({"vectors": [one.tolist()], "k": K, "mode": "raw"}).encode() for one in queries]
        for what, command in (
            ("naive handler", ["-m", "benchmarks.serve", "--naive", store]),
            ("frontalis serve", ["-m", "frontalis", "serve", "--store", store, "--port", "0", "--refresh", "0.2"]),
        ):
            with running(command) as port:
                for clients in CLIENTS:
                    lines.append(asyncio.run(load(what, port, clients, bodies, options.seconds)))
                if what == "frontalis serve":
                    lines.append(
                        asyncio.run(load("the same, .npy of 256", port, 2, batches(queries), options.seconds, BATCH))
                    )
                    lines.append(
                        asyncio.run(
                            load(
                                "the same, releases change",
                                port,
                                8,
                                bodies,
                                options.seconds,
                                change=lambda: change(store),
                            )
                        )
                    )
    print(f"{options.rows:,} rows, D = {options.dim}, k = {K}, {os.cpu_count()} cores")
    print("| what | clients | queries/s | p50 ms | p99 ms | load average |\n|---|---:|---:|---:|---:|---:|")
    for line in lines:
        figures = f"{line.queries:,.0f} | {line.p50:.1f} | {line.p99:.1f} | {line.load:.0f}"
        print(f"| {line.what} | {line.clients} | {figures} |")
    return lines


def make_store(folder: Path, rows: int, dim: int) -> str:
    """Make a store with two releases; the second lacks one row."""
    synthesize(folder / "source", subjects=rows // PER_SUBJECT, per_subject=PER_SUBJECT, dim=dim, shards=4)
    model(folder, "per_sample", dim)
    settings = pipeline(
        source=str(folder / "source"),
        store=str(folder / "store"),
        models={"per_sample": str(folder / "per_sample.safetensors")},
        evaluation={"max_rows": 2000, "resamples": 0},
        gate={"tolerance": 1.0, "undecided": "promote"},
    )
    reprocess(settings)
    first = min((folder / "source").glob("*.parquet"))
    pq.write_table(pq.read_table(first).slice(1), first)
    outcome = reprocess(settings)
    if outcome.status != "promoted":
        raise SystemExit(f"the second release was not promoted: {outcome}")
    return settings.store


def bare(store: str, batches: np.ndarray, seconds: float) -> Line:
    """Search the index of raw in a loop, without ids or columns."""
    index = open_release(store).index("raw")._index  # what FAISS alone takes
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends:
        batch = batches[len(times) % len(batches)]
        index.search(batch / np.linalg.norm(batch, axis=1, keepdims=True), K)
        times.append(time.perf_counter() - began)
    return line_of(f"bare FAISS, {batches.shape[1]} a call", 1, times, sum(times), batches.shape[1])


def batches(queries: np.ndarray) -> list[bytes]:
    """Return the queries as bytes of `.npy` files of `BATCH` rows."""
    found = []
    for part in queries.reshape(-1, BATCH, queries.shape[1]):
        target = io.BytesIO()
        np.save(target, part)
        found.append(target.getvalue())
    return found


async def load(
    what: str,
    port: int,
    clients: int,
    bodies: Sequence[bytes],
    seconds: float,
    size: int = 1,
    change: Callable[[], None] | None = None,
) -> Line:
    """Let some clients ask for some seconds, each over a connection of its own."""
    npy = size > 1
    path, kind = (f"/search/npy?k={K}&mode=raw", "application/octet-stream") if npy else ("/search", "application/json")
    request = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: {kind}\r\n"
    times: list[float] = []
    releases: set[str] = set()
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        at = number
        while loop.time() < began + seconds:
            body = bodies[at % len(bodies)]
            at += clients
            sent = loop.time()
            writer.write(f"{request}content-length: {len(body)}\r\n\r\n".encode() + body)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            answer = await reader.readexactly(int(re.findall(r"content-length: (\d+)", head)[0]))
            times.append(loop.time() - sent)
            named = set(re.findall(rb'"release":"([^"]+)"', answer))
            if not head.startswith("http/1.1 200") or len(named) != 1:
                raise SystemExit(f"{what}: {head} {answer[:200]!r}")
            releases.update(one.decode() for one in named)
        writer.close()

    async def changing(work_beside: Callable[[], None]) -> None:
        while loop.time() < began + seconds:
            await loop.run_in_executor(None, work_beside)
            await asyncio.sleep(0.5)

    work: list[Awaitable[None]] = [client(number) for number in range(clients)]
    if change is not None:
        work.append(changing(change))
    await asyncio.gather(*work)
    if change is not None:
        what = f"{what} ({len(releases)} seen)"
    return line_of(what, clients, times, loop.time() - began, size)


def change(store: str) -> None:
    """Serve the other one of the two releases, back and forth, and vacuum the store."""
    history = Releases(Location(store))
    roll_back(store, next(one.release for one in history.all() if not one.serving))
    clean(store, grace_hours=0)


def line_of(what: str, clients: int, times: Sequence[float], seconds: float, size: int) -> Line:
    p50, p99 = 1000 * np.quantile(times, [0.5, 0.99])
    return Line(what, clients, size * len(times) / seconds, p50, p99, os.getloadavg()[0])


@contextmanager
def running(command: list[str]) -> Iterator[int]:
    """Run a service, and give its port."""
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise SystemExit("the service did not start")
        yield int(found[1])
    finally:
        process.terminate()
        process.communicate()


def serve_naively(store: str) -> None:
    """Serve a handler as one writes it first: no batches, no limits, one thread a request."""
    import uvicorn
    from fastapi import FastAPI

    app, opened = FastAPI(), frontalis.open_store(store)

    @app.post("/search")
    def search(asked: dict[str, Any]) -> dict[str, Any]:
        found = opened.index(asked["mode"]).search(np.array(asked["vectors"], np.float32), asked["k"])
        fmr = opened.fmr(asked["mode"], found.scores)
        return {
            "release": found.release,
            "neighbours": [
                {"id": one, "subject": subject, "score": score, "fmr": rate}
                for one, subject, score, rate in zip(
                    found.ids[0], found.columns["subject"][0], found.scores[0].tolist(), fmr[0].tolist(), strict=True
                )
            ],
        }

    config = uvicorn.Config(app, port=0, access_log=False)
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
