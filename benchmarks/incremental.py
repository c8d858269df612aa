"""What a run_once costs: `frontalis reprocess` over many shards, at first, without a change, with one shard changed.

    python -m benchmarks.incremental [--shards 1000] [--rows 500] [--dim 64] [--repeats 3] [--changes 3]

Each run_once is a process of its own against a running Prefect server, as a schedule starts it. `work` is what the flow
says of itself, `whole` the process from start to end, `cpu` its user and system time with that of its children (the
server's is not in it). Wall times mean little on a busy machine, so the load average stands beside them, and the CPU
time, which a busy machine changes least.
"""

import argparse
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from models.architectures import build
from models.checkpoint import save
from models.se import gather_statistics
from schemas.models import Mode, ModelCard
from tasks.synthetic.shards import synthesize

MODES: tuple[Mode, ...] = ("per_sample", "batch_stat")
PER_SUBJECT = 10
HEALTHY_SECONDS = 120


@dataclass(frozen=True)
class Measured:
    """Seconds of one run, and what it did."""

    what: str
    status: str
    computed: int
    work: float
    whole: float
    cpu: float
    load: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=500, help="of a shard, a multiple of 10")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="runs without a change")
    parser.add_argument("--changes", type=int, default=3, help="runs with one shard changed, another each time")
    parser.add_argument("--folder", help="where to work; a temporary folder by default")
    options = parser.parse_args()
    print(f"{options.shards:,} shards of {options.rows:,} rows, D = {options.dim}, two models, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=options.folder) as name, prefect_server(Path(name)) as url:
        folder = Path(name)
        subjects = options.shards * options.rows // PER_SUBJECT
        synthesize(
            folder / "source", subjects=subjects, per_subject=PER_SUBJECT, dim=options.dim, shards=options.shards
        )
        for mode in MODES:
            model(folder, mode, options.dim)
        (folder / "pipeline.toml").write_text(
            f"source = '{folder / 'source'}'\nstore = '{folder / 'store'}'\n[models]\n"
            + "".join(f"{mode} = '{folder / mode}.safetensors'\n" for mode in MODES)
            + "[evaluation]\nmax_rows = 5000\nresamples = 0\n[gate]\ntolerance = 1.0\n"
        )
        runs = [run_once("first", folder, url)]
        runs += [run_once("unchanged", folder, url) for _ in range(options.repeats)]
        for number in range(options.changes):
            change_one(folder / "source", number)
            runs.append(run_once("one shard changed", folder, url))
    show(runs)


def run_once(what: str, folder: Path, url: str) -> Measured:
    """Run one run_once and take its times; its log goes to stderr."""
    command = [sys.executable, "-m", "frontalis", "reprocess", "--config", str(folder / "pipeline.toml"), "--json"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, env=environment(folder, url), stdout=subprocess.PIPE, text=True, check=True)
    whole = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    outcome = json.loads(done.stdout)
    return Measured(
        what,
        outcome["status"],
        outcome["shards_computed"],
        outcome["seconds"],
        whole,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        os.getloadavg()[0],
    )


def show(runs: list[Measured]) -> None:
    print(f"{'run_once':<18} {'status':<10} {'computed':>8} {'work s':>8} {'whole s':>8} {'cpu s':>8} {'load':>6}")
    for one in runs:
        print(
            f"{one.what:<18} {one.status:<10} {one.computed:>8,} {one.work:>8.1f} {one.whole:>8.1f} {one.cpu:>8.1f} "
            f"{one.load:>6.1f}"
        )
    for what in ("unchanged", "one shard changed"):
        same = [one for one in runs if one.what == what]
        if same:
            print(
                f"{what}, median of {len(same)}: work {statistics.median(one.work for one in same):.2f} s, "
                f"whole {statistics.median(one.whole for one in same):.1f} s, "
                f"cpu {statistics.median(one.cpu for one in same):.1f} s"
            )


def model(folder: Path, mode: Mode, dim: int) -> Path:
    """Write an untrained checkpoint whose weights are perturbed."""
    arguments = {"feature_dim": dim, "reduction": 4, "use_batch_stat": mode == "batch_stat"}
    random = torch.Generator().manual_seed(0)
    network = build("dual_branch", arguments).eval()
    with torch.no_grad():
        for weights in network.parameters():
            weights += 0.02 * torch.randn(weights.shape, generator=random)
    gather_statistics(network, [torch.nn.functional.normalize(torch.randn(256, dim, generator=random))])
    card = ModelCard(architecture="dual_branch", arguments=arguments, mode=mode, embedding_dim=dim)
    path = folder / f"{mode}.safetensors"
    save(card, network, path)
    return path


def change_one(source: Path, number: int) -> None:
    """Turn the vectors of one shard around, of another for each number: the middle one and those after it."""
    files = sorted(source.iterdir())
    file = files[(len(files) // 2 + number) % len(files)]
    table = pq.read_table(file)
    at = table.schema.get_field_index("embedding")
    turned = table["embedding"].combine_chunks().take(pa.array(range(table.num_rows - 1, -1, -1)))
    pq.write_table(table.set_column(at, table.schema.field(at), turned), file, compression="none")


@contextmanager
def prefect_server(folder: Path) -> Iterator[str]:
    """Run a server on a free port, with a PREFECT_HOME of its own, and give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment(folder, url), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_healthy(f"{url}/health", process)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def environment(folder: Path, url: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {
        **ours,
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def wait_until_healthy(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + HEALTHY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise SystemExit(f"the Prefect server did not start within {HEALTHY_SECONDS} s")


if __name__ == "__main__":
    main()
