"""A Prefect server that does not answer: one line that names it and the way out, soon, and no traceback."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.e2e


class Broken(http.server.BaseHTTPRequestHandler):
    """Answers everything with 500, or below /busy with 503, which Prefect would ask again for minutes."""

    def do_GET(self) -> None:
        self.send_response(503 if self.path.startswith("/busy") else 500)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def broken() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def nobody() -> Iterator[str]:
    with socket.socket() as bound:  # bound, but nobody listens
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def frontalis(url: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command with that PREFECT_API_URL."""
    command = [sys.executable, "-m", "frontalis", *map(str, words)]
    env = {**os.environ, "PREFECT_API_URL": url}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=150, check=False)


def commands(tiny_source, tiny_models, tmp_path) -> dict[str, list[object]]:
    """Return every command that starts a flow."""
    return {
        "train": ["train", tiny_source, "--out", tmp_path / "x.safetensors"],
        "reprocess": ["reprocess", "--source", tiny_source, "--store", tmp_path / "store", *tiny_models.arguments],
        "evaluate": ["evaluate", "--store", tmp_path / "store"],
    }


@pytest.mark.parametrize("command", ["train", "reprocess", "evaluate"])
def test_nobody_listens(nobody, tiny_source, tiny_models, tmp_path, command: str) -> None:
    done = frontalis(f"{nobody}/api", *commands(tiny_source, tiny_models, tmp_path)[command])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"frontalis: PREFECT_API_URL = {nobody}/api: no Prefect server answers there ([Errno 111] Connection refused); "
        "start one with `prefect server start`, or unset PREFECT_API_URL.\n"
    )
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.parametrize(
    ("url", "shown", "why"),
    [
        ("http://no-such-host.invalid:4200/api", "", "known|resol"),
        ("{broken}/api", "", "500 Internal Server Error"),
        ("{broken}/busy", "", "503 Service Unavailable"),
        ("http://me:secret@no-such-host.invalid/api", "http://no-such-host.invalid/api", "known|resol"),
        ("nonsense", "", "missing an 'http://'"),
    ],
)
def test_no_such_host_or_a_server_in_trouble(broken, tmp_path, url: str, shown: str, why: str) -> None:
    url = url.format(broken=broken)
    started = time.monotonic()
    done = frontalis(url, "evaluate", "--store", tmp_path)
    assert time.monotonic() - started < 60
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"frontalis: PREFECT_API_URL = {shown or url}: no Prefect server answers there (")
    assert line.endswith("start one with `prefect server start`, or unset PREFECT_API_URL.")
    assert any(part in line for part in why.split("|"))


@pytest.mark.parametrize(
    "words", [["query", "--id", "x"], ["verify"], ["vacuum"], ["forget", "--id", "x"], ["rollback", "r1"], ["releases"]]
)
def test_commands_without_a_flow_need_no_server(nobody, tmp_path, words) -> None:
    done = frontalis(f"{nobody}/api", words[0], "--store", tmp_path / "none", *words[1:])
    assert done.returncode == 2, done.stderr
    assert "does not exist" in done.stderr
    assert "Prefect" not in done.stderr
