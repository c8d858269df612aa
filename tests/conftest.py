"""What many tests share: a Prefect of their own, a real server, and a source with two models small enough for seconds.

Whatever the machine's own Prefect is set to is hidden from every test and every process that a test starts: they get a
fresh PREFECT_HOME and never talk to another server.
"""

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

import pytest
import torch

from models.architectures import build
from models.checkpoint import library_versions, save
from models.se import gather_statistics
from schemas.models import Mode, ModelCard
from schemas.settings import PipelineSettings, pipeline
from schemas.split import SplitRule, split_of, subject_key
from tasks.plan import Plan, make_plan, prepare_models
from tasks.publish import Published, publish
from tasks.reweight import ReweightSpec, ShardResult, reweight_group
from tasks.synth import synthesize

TINY_DIM = 32
TINY_SUBJECTS = 20
TINY_SPLIT = SplitRule(salt="tiny", train=0.4, validation=0.1, test=0.5)
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

    A small `strength` moves features a little (the gate lets it pass); a large one (1.0) ruins them (kept back).
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
class Night:
    """What the stages up to the commit gave: a run without Prefect, index and evaluation. Unpacks in this order."""

    plan: Plan
    results: list[ShardResult]
    published: Published

    def __iter__(self) -> Iterator[object]:
        return iter((self.plan, self.results, self.published))


@pytest.fixture(scope="session")
def night() -> Callable[[PipelineSettings], Night]:
    """`night(settings)`: plan, reweight and publish in this process."""

    def run(settings: PipelineSettings) -> Night:
        models = prepare_models(settings)
        plan = make_plan(settings, models)
        spec = ReweightSpec.of(settings, models, plan.schema)
        results = [result for group in plan.groups for result in reweight_group(group, spec)]
        return Night(plan, results, publish(settings, plan, results))

    return run


@pytest.fixture(scope="session")
def pipeline_of(tiny_models: TinyModels) -> Callable[..., PipelineSettings]:
    """`pipeline_of(source, store, **settings)`: both tiny models unless others are given, and no bootstrap."""

    def make(source: str | Path, store: str | Path, **settings: object) -> PipelineSettings:
        values = {"source": str(source), "store": str(store), "models": tiny_models.by_mode}
        return pipeline(**{**values, "evaluation": {"resamples": 0}, **settings})

    return make


_HOME = pytest.StashKey[Path]()
