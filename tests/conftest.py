"""What holds for every test: a Prefect of its own, one thread a worker, and which tests are slow by nature.

Whatever the machine's own Prefect is set to is hidden from every test and every process that a test starts: they get a
fresh PREFECT_HOME and never talk to another server.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

pytest_plugins = [
    "tests.server_fixtures",
    "tests.pipeline_fixtures",
    "tests.hostile_fixtures",
    "tests.report_fixtures",
]

# A server, a browser, a process, the whole job: slow by nature.
E2E_FIXTURES = {"prefect_server", "s3", "browser", "memory_grown", "run_pipeline", "job"}
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
    """Mark as e2e what needs a server, a browser or the whole job, and put files with such tests first."""
    for item in items:
        if not E2E_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.e2e)
    # Files with slow tests first, so that at the end no worker is left alone with one.
    slow = {item.path for item in items if item.get_closest_marker("e2e")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the PREFECT_HOME of this session."""
    shutil.rmtree(config.stash[_HOME], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


_HOME = pytest.StashKey[Path]()
