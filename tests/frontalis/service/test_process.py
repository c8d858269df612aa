"""`frontalis serve` as a process: it answers while releases are promoted and rolled back, and ends cleanly."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from frontalis.service.server import listen, token_of
from schemas.errors import SettingsError
from storage.location import Location
from storage.releases import Releases

# The process says at its end what it has imported.
CODE = """
import atexit, sys
from frontalis.cli import main
atexit.register(lambda: print("prefect" in sys.modules))
main()
"""


def ask(port: int, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/search", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.e2e
def test_it_answers_while_releases_change_and_ends_with_what_was_asked(
    measured_store, pipeline_of, serve_stages, tiny_source, tmp_path
) -> None:
    uri = str(shutil.copytree(measured_store, tmp_path / "store"))
    command = [sys.executable, "-c", CODE, "serve", "--store", uri, "--port", "0", "--refresh", "0.05"]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", (tmp_path / "log").read_text())):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        port, stop = int(found[1]), threading.Event()
        seen: list[list[str]] = [[] for _ in range(3)]
        problems: list[Exception] = []

        def go(mine: list[str]) -> None:
            while not stop.is_set():
                try:
                    answer = ask(port, {"vectors": [[1.0] * 32] * 3, "k": 4, "mode": "all"})
                    names = {answer["release"], *(one["release"] for one in answer["answers"].values())}
                    assert len(names) == 1, names
                    mine.append(answer["release"])
                except Exception as error:
                    problems.append(error)
                    return

        threads = [threading.Thread(target=go, args=(mine,)) for mine in seen]
        for thread in threads:
            thread.start()
        serve_stages(pipeline_of(tiny_source, uri))
        while not problems and not all(mine[-1:] == ["r2"] for mine in seen):
            time.sleep(0.05)
        Releases(Location(uri)).serve("r1")
        while not problems and not all(mine[-1:] == ["r1"] for mine in seen):
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
        assert problems == []
        assert all({"r1", "r2"} == set(mine) for mine in seen)
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (0, "False\n"), (tmp_path / "log").read_text()
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
        log.close()


def test_other_addresses_want_a_token_and_a_taken_one_is_refused() -> None:
    secret = "x" * 16
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert token_of(host, {}) is None
        assert token_of(host, {"FRONTALIS_TOKEN": secret}) == secret
    for host in ("0.0.0.0", "::", "example.org", "192.168.0.1"):
        assert token_of(host, {"FRONTALIS_TOKEN": secret}) == secret
        with pytest.raises(SettingsError, match="can be reached by others, so set FRONTALIS_TOKEN"):
            token_of(host, {})
    for token in ("short", "x" * 15 + "\n", "ü" * 20, "two words and more"):
        with pytest.raises(SettingsError, match="16 or more printable ASCII"):
            token_of("127.0.0.1", {"FRONTALIS_TOKEN": token})
    with listen("127.0.0.1", 0) as taken, pytest.raises(SettingsError, match="cannot be listened on"):
        listen("127.0.0.1", taken.getsockname()[1])
