"""One real Prefect server for all workers of a test session."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

HEALTHY_SECONDS = 150
STOP_SECONDS = 10
LOG_TAIL = 4000


@dataclass(frozen=True)
class PrefectServer:
    """A running server: `url` of its API, `env` for a process that shall use it, `log` of all it printed."""

    url: str
    env: Mapping[str, str]
    log: Path


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A real `prefect server start` on a free port: the first worker that asks starts it, the last one stops it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "prefect-server"
    folder.mkdir(exist_ok=True)
    state, lock = folder / "state.json", FileLock(folder / ".lock")
    with lock:
        running = json.loads(state.read_text()) if state.exists() else {**_start(folder), "users": 0}
        running["users"] += 1
        state.write_text(json.dumps(running))
    env = {
        **os.environ,
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_URL": running["url"],
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    }
    try:
        yield PrefectServer(running["url"], env, folder / "server.log")
    finally:
        with lock:
            running = json.loads(state.read_text())
            running["users"] -= 1
            state.write_text(json.dumps(running))
            if not running["users"]:
                state.unlink()
                _end_group(running["process"])


def _start(folder: Path) -> dict[str, object]:
    """Start a server and wait until it answers; return its URL and process id."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    env = {**os.environ, "PREFECT_HOME": str(folder / "home"), "PREFECT_SERVER_UI_ENABLED": "false"}
    log = folder / "server.log"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )
    try:
        _wait_until_healthy(f"{url}/health", process, log)
    except BaseException:
        _end_group(process.pid)
        raise
    process.returncode = 0  # this worker may end before the server, so it leaves the waiting to the last one
    return {"url": url, "process": process.pid}


def _free_port() -> int:
    """Return a TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def _end_group(leader: int) -> None:
    """End a process that leads its own group, and all it has started: with SIGTERM, then with SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(leader, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + STOP_SECONDS
        while _runs(leader) and time.monotonic() < deadline:
            time.sleep(0.1)


def _runs(process: int) -> bool:
    """Return whether a process runs; one that ended and that nobody has waited for (another worker's) does not."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the server's log beside a test that failed with it."""
    report = yield
    server = getattr(item, "funcargs", {}).get("prefect_server")
    if report.failed and server is not None:
        report.sections.append(("Prefect server", server.log.read_text(errors="replace")[-LOG_TAIL:]))
    return report
