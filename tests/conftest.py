"""What many tests share: a Prefect of their own, a real server, and a source with two models small enough for seconds.

Whatever the machine's own Prefect is set to is hidden from every test and every process that a test starts: they get a
fresh PREFECT_HOME and never talk to another server.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.architectures import build
from models.checkpoint import library_versions, save
from models.se import gather_statistics
from models.split import split_of, subject_key
from schemas.models import Mode, ModelCard
from schemas.settings import PipelineSettings, pipeline
from schemas.split import SplitRule
from tasks.plan import Plan, make_plan, prepare_models
from tasks.publish import Published, publish
from tasks.reweight import ReweightSpec, ShardResult, reweight_group
from tasks.synthetic.shards import synthesize

pytest_plugins = ["tests.pipeline_fixtures", "tests.report_fixtures"]

TINY_DIM = 32
TINY_SUBJECTS = 20
TINY_SPLIT = SplitRule(salt="tiny", train=0.4, validation=0.1, test=0.5)
E2E_FIXTURES = {"prefect_server", "s3", "browser", "memory_grown"}
HEALTHY_SECONDS = 150
LOG_TAIL = 4000

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    # A busy disk may keep the server's SQLite locked for longer than the 10 s it waits.
    "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
    "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
}


def pytest_configure(config: pytest.Config) -> None:
    """Hide the machine's own Prefect before anything imports Prefect."""
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    config.stash[_HOME] = Path(tempfile.mkdtemp(prefix="frontalis-prefect-"))
    os.environ |= {"PREFECT_HOME": str(config.stash[_HOME]), **QUIET}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as e2e whatever needs a server, a browser or a process of its own: `make test-fast` leaves it out."""
    for item in items:
        if not E2E_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.e2e)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the PREFECT_HOME of this session."""
    shutil.rmtree(config.stash[_HOME], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the server's log beside a test that failed with it."""
    report = yield
    server = getattr(item, "funcargs", {}).get("prefect_server")
    if report.failed and server is not None:
        report.sections.append(("Prefect server", server.log.read_text(errors="replace")[-LOG_TAIL:]))
    return report


@dataclass(frozen=True)
class PrefectServer:
    """A running server: `url` of its API, `env` for a process that shall use it, `log` of all it printed."""

    url: str
    env: Mapping[str, str]
    log: Path


@dataclass(frozen=True)
class TinyModels:
    """Checkpoints of both modes for `tiny_source`; `arguments` are the `--model` options of `frontalis reprocess`."""

    per_sample: Path
    batch_stat: Path

    @property
    def by_mode(self) -> dict[Mode, str]:
        return {"per_sample": str(self.per_sample), "batch_stat": str(self.batch_stat)}

    @property
    def arguments(self) -> list[str]:
        return [part for mode, path in self.by_mode.items() for part in ("--model", f"{mode}={path}")]


MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A real `prefect server start` on a free port, with a PREFECT_HOME of its own; one for the whole session."""
    folder = tmp_path_factory.mktemp("prefect-server")
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    env = {
        **os.environ,
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    }
    log = folder / "server.log"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**env, "PREFECT_SERVER_UI_ENABLED": "false"},
            start_new_session=True,
        )
    try:
        _wait_until_healthy(f"{url}/health", process, log)
        yield PrefectServer(url, env, log)
    finally:
        _end_group(process)


def _free_port() -> int:
    """Return a TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads its own group, and all it has started: politely first, then surely."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _wait_until_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + HEALTHY_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        if process.poll() is not None:
            break
        time.sleep(0.2)
    pytest.fail(f"the Prefect server did not start:\n{log.read_text(errors='replace')[-LOG_TAIL:]}")


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labelled shards of 20 subjects × 14 rows of 32 numbers. Shared: copy it before you change it."""
    folder = tmp_path_factory.mktemp("tiny-source") / "shards"
    synthesize(folder, subjects=TINY_SUBJECTS, per_subject=14, dim=TINY_DIM, shards=3, seed=11)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> TinyModels:
    """Checkpoints of both modes that move features a little, and have seen half of the subjects of `tiny_source`."""
    folder = tmp_path_factory.mktemp("tiny-models")
    return TinyModels(
        make_checkpoint(folder / "per_sample.safetensors", "per_sample"),
        make_checkpoint(folder / "batch_stat.safetensors", "batch_stat"),
    )


@pytest.fixture(scope="session")
def make_checkpoint() -> MakeCheckpoint:
    """`make_checkpoint(path, mode, *, dim=32, seed=0, strength=0.02)`: an untrained network, its weights perturbed.

    A small `strength` moves features a little (the gate lets it pass); a large one (1.0) ruins them (rejected).
    """
    return _make_checkpoint


def _make_checkpoint(
    path: Path, mode: Mode = "per_sample", *, dim: int = TINY_DIM, seed: int = 0, strength: float = 0.02
) -> Path:
    arguments = {"feature_dim": dim, "reduction": 4, "use_batch_stat": mode == "batch_stat"}
    random = torch.Generator().manual_seed(seed)
    model = build("dual_branch", arguments).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights += strength * torch.randn(weights.shape, generator=random)
    gather_statistics(model, [torch.nn.functional.normalize(torch.randn(256, dim, generator=random))])
    card = ModelCard(
        architecture="dual_branch",
        arguments=arguments,
        mode=mode,
        embedding_dim=dim,
        normalisation="l2",
        split=TINY_SPLIT,
        versions=library_versions(),
    )
    names = [f"subject-{number:06d}" for number in range(TINY_SUBJECTS)]
    seen = [subject_key(name, TINY_SPLIT.salt) for name in names if split_of(name, TINY_SPLIT) != "test"]
    save(card, model, path, torch.tensor(seen).numpy())
    return path


@dataclass(frozen=True)
class StagesResult:
    """What the stages up to the commit gave: a run without Prefect, index and evaluation. Unpacks in this order."""

    plan: Plan
    results: list[ShardResult]
    published: Published

    def __iter__(self) -> Iterator[object]:
        return iter((self.plan, self.results, self.published))


@pytest.fixture(scope="session")
def run_stages() -> Callable[[PipelineSettings], StagesResult]:
    """`run_stages(settings)`: plan, reweight and publish in this process."""

    def run(settings: PipelineSettings) -> StagesResult:
        models = prepare_models(settings)
        plan = make_plan(settings, models)
        spec = ReweightSpec.of(settings, models, plan.schema)
        results = [result for group in plan.groups for result in reweight_group(group, spec)]
        return StagesResult(plan, results, publish(settings, plan, results))

    return run


@pytest.fixture(scope="session")
def pipeline_of(tiny_models: TinyModels) -> Callable[..., PipelineSettings]:
    """`pipeline_of(source, store, **settings)`: both tiny models unless others are given, and no bootstrap."""

    def make(source: str | Path, store: str | Path, **settings: object) -> PipelineSettings:
        values = {"source": str(source), "store": str(store), "models": tiny_models.by_mode}
        return pipeline(**{**values, "evaluation": {"resamples": 0}, **settings})

    return make


def _hostile(path: Path, kind: str) -> None:
    """Write a few kilobytes or megabytes of Parquet that unpack to more than 2 GB; `harmless` does not."""
    rows, million = 8192, 1_000_000
    vectors = np.random.default_rng(0).standard_normal(rows * TINY_DIM).astype(np.float32)
    ids = pa.array([f"i{row}" for row in range(rows)])
    columns = {"id": ids, "embedding": pa.FixedSizeListArray.from_arrays(vectors, TINY_DIM), "subject": ids}
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
def hostile() -> Callable[[Path, str], None]:
    """`hostile(path, kind)` writes a small file that unpacks to gigabytes; `test_blocks.py` lists the kinds."""
    return _hostile


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


_HOME = pytest.StashKey[Path]()
