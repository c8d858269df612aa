"""A Prefect server that does not answer or is lost: one line that names it and the way out, soon, and no traceback."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from frontalis import cli, process
from storage.location import Location
from storage.releases import Releases
from tests import server_fixtures
from tests.commands import frontalis, start

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


def at(url: str) -> dict[str, str]:
    """Return the environment with that PREFECT_API_URL."""
    return {**os.environ, "PREFECT_API_URL": url}


def commands(tiny_source, tiny_models, tmp_path) -> dict[str, list[object]]:
    """Return every command that starts a flow."""
    return {
        "train": ["train", tiny_source, "--out", tmp_path / "x.safetensors"],
        "reprocess": ["reprocess", "--source", tiny_source, "--store", tmp_path / "store", *tiny_models.arguments],
        "evaluate": ["evaluate", "--store", tmp_path / "store"],
    }


@pytest.mark.parametrize("command", ["train", "reprocess", "evaluate"])
def test_nobody_listens(nobody, tiny_source, tiny_models, tmp_path, command: str) -> None:
    done = frontalis(*commands(tiny_source, tiny_models, tmp_path)[command], env=at(f"{nobody}/api"))
    assert (done.returncode, done.stdout) == (2, "")
    began, refused = done.stderr.splitlines()
    assert f" I {command}: " in began
    assert refused == (
        f"frontalis: PREFECT_API_URL = {nobody}/api: no Prefect server answers there ([Errno 111] Connection refused); "
        "start one with `prefect server start`, or unset PREFECT_API_URL to run without Prefect."
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
    done = frontalis("evaluate", "--store", tmp_path, env=at(url))
    assert time.monotonic() - started < 60
    assert (done.returncode, done.stdout) == (2, "")
    began, line = done.stderr.splitlines()
    assert " I evaluate: the served release of " in began
    assert line.startswith(f"frontalis: PREFECT_API_URL = {shown or url}: no Prefect server answers there (")
    assert line.endswith("start one with `prefect server start`, or unset PREFECT_API_URL to run without Prefect.")
    assert any(part in line for part in why.split("|"))


@pytest.mark.parametrize(
    "words", [["query", "--id", "x"], ["verify"], ["vacuum"], ["forget", "--id", "x"], ["rollback", "r1"], ["releases"]]
)
def test_commands_without_a_flow_need_no_server(nobody, tmp_path, words) -> None:
    done = frontalis(words[0], "--store", tmp_path / "none", *words[1:], env=at(f"{nobody}/api"))
    assert done.returncode == 2, done.stderr
    assert "does not exist" in done.stderr
    assert "Prefect" not in done.stderr


@pytest.mark.timeout(600)  # two servers, two runs
def test_a_server_that_dies_during_a_run_is_named_and_the_next_run_finishes(
    tiny_source, tiny_models, tmp_path, prefect_server
) -> None:
    store = tmp_path / "store"
    words = ["reprocess", "--source", tiny_source, "--store", store, *tiny_models.arguments]
    (tmp_path / "own").mkdir()
    own = server_fixtures._start(tmp_path / "own")
    env = {**prefect_server.env, "PREFECT_API_URL": own["url"], "PREFECT_CLIENT_MAX_RETRIES": "1"}
    try:
        with start(*words, env=env) as run:
            while run.poll() is None and not list(store.glob("features/mode=*")):
                time.sleep(0.01)
            os.killpg(own["process"], signal.SIGKILL)
            printed, said = run.communicate(timeout=300)
    finally:
        server_fixtures._end_group(own["process"])
    assert (run.returncode, printed) == (1, ""), said
    *progress, last = said.splitlines()
    assert last.startswith(f"frontalis: the Prefect server at {own['url']} stopped answering (")
    assert last.endswith("What is complete is kept: run the same command again once a server is there.")
    assert all(line[2] == ":" and line[9] in "IW" for line in progress), said

    again = frontalis(*words, env=prefect_server.env)
    assert again.returncode == 0, again.stderr
    (release,) = Releases(Location(str(store))).all()
    assert release.serving


def test_without_a_server_no_prefect_is_loaded(tmp_path) -> None:
    """Also where HOME cannot be used: Prefect would keep its files there."""
    (tmp_path / "home").touch()  # a file in the place of the folder stops root as well
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    code = "import sys; from frontalis.server import uses_prefect; print(uses_prefect(), 'prefect' in sys.modules)"
    for home, url, expected in (
        (tmp_path / "home", None, "False False"),
        (tmp_path / "home", "http://127.0.0.1:9/api", "True False"),
        (tmp_path, None, "True True"),  # the profile there has a server
    ):
        (tmp_path / ".prefect").mkdir(exist_ok=True)
        (tmp_path / ".prefect/profiles.toml").write_text('active = "x"\n[profiles.x]\nPREFECT_API_URL = "http://h/api"')
        given = {"HOME": str(home)} | ({"PREFECT_API_URL": url} if url else {})
        done = subprocess.run(
            [sys.executable, "-c", code], env=env | given, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize("command", ["train", "reprocess", "evaluate"])
def test_a_home_that_prefect_needs_and_cannot_use_is_named(
    tiny_source, tiny_models, tmp_path, monkeypatch, capsys, command
) -> None:
    """Prefect, were it imported, would end with a traceback."""

    def run() -> str:
        words = commands(tiny_source, tiny_models, tmp_path)[command]
        monkeypatch.setattr("sys.argv", ["frontalis", *map(str, words)])
        assert process._run(cli.app, process.Command()) == 2
        return capsys.readouterr().err

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / ("x" * 300)))  # cannot be read, not even by root
    assert run() == (
        f"frontalis: PREFECT_HOME = {tmp_path / ('x' * 300)}/.prefect: cannot be read (File name too long); set "
        "PREFECT_HOME to a folder of yours.\n"
    )
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # an arbitrary user of a container
    assert run() == (
        f"frontalis: HOME is not set, and user {os.getuid()} has no home directory; set HOME to a folder of yours.\n"
    )
