"""`frontalis` as a process of its own that starts in half a second: a copy (fork) of one that has loaded the libraries.

A fresh interpreter spends 3 s of processor time on loading PyTorch, PyArrow and Polars before a command begins, and a
test session starts about a hundred. The copies are processes like any other: with their own memory, environment and
signals, to be killed at any moment. Prefect, which reads the environment when it is imported, is not loaded
beforehand. What a test says about starting itself (imports, signals while libraries load, closed streams) needs a fresh
interpreter.
"""

import contextlib
import functools
import gc
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

LOADED = (
    "torch", "numpy", "scipy.stats", "pyarrow.parquet", "pyarrow.dataset", "pyarrow.fs", "polars", "deltalake", "faiss",
    "safetensors.torch", "matplotlib.figure", "httpx", "sqlalchemy", "anyio", "griffe", "pendulum", "jinja2",
    "websockets", "opentelemetry.trace", "prometheus_client", "jsonschema", "pydantic_settings",
    "frontalis.cli", "tasks.reprocess",
)  # fmt: skip
START_SECONDS = 120


class Forked:
    """A running command; stands for `subprocess.Popen` with text. It leads a session and a process group of its own."""

    def __init__(self, answer: socket.socket, pid: int, stdout: Path, stderr: Path) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._answer = answer

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_group()

    def poll(self) -> int | None:
        """Return the exit code (minus the signal's number for one that was killed), or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        if self.returncode is None:
            ready, _, _ = select.select([self._answer], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired("frontalis", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(self._answer.recv(64)))
            self._answer.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end and return what was printed to stdout and stderr."""
        self.wait(timeout)
        return self.stdout.read_text(), self.stderr.read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Kill it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(START_SECONDS)


def start(*words: object, env: Mapping[str, str] | None = None) -> Forked:
    """Start `frontalis WORDS…` with that environment (this process's if None), in this process's working directory."""
    folder = Path(tempfile.mkdtemp(prefix="command-", dir=_folder()))
    stdout, stderr = folder / "stdout", folder / "stderr"
    request = {"words": [str(word) for word in words], "env": dict(os.environ if env is None else env)}
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(_address()))
    with stdout.open("wb") as out, stderr.open("wb") as err:
        content = json.dumps(request | {"folder": str(Path.cwd())}).encode()
        socket.send_fds(connection, [len(content).to_bytes(8, "little")], [out.fileno(), err.fileno()])
        connection.sendall(content)
        pid = int(connection.recv(64))
    return Forked(connection, pid, stdout, stderr)


def frontalis(
    *words: object, env: Mapping[str, str] | None = None, timeout: float = 170
) -> "subprocess.CompletedProcess[str]":
    """Run `frontalis WORDS…` to its end, as `subprocess.run` would.

    Raises:
        subprocess.TimeoutExpired: it still runs after `timeout` seconds, and was killed.
    """
    with start(*words, env=env) as run:
        stdout, stderr = run.communicate(timeout)
        return subprocess.CompletedProcess(["frontalis", *map(str, words)], run.wait(), stdout, stderr)


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="frontalis-commands-"))


@functools.cache
def _address() -> Path:
    """Start the process that is copied; it ends with this one, whose pipe it reads."""
    address = _folder() / "socket"
    template = subprocess.Popen(
        [sys.executable, "-m", "tests.commands", str(address)],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    _running.append(template)
    assert template.stdout is not None
    assert template.stdout.readline() == b"ready\n", "the process to be copied did not start"
    return address


_running: list["subprocess.Popen[bytes]"] = []


def serve(address: str) -> list[str] | None:
    """Copy this process for each request.

    In a copy this returns the command's words; in the process that is copied None, once nobody can ask any more.
    """
    for name in LOADED:
        import_module(name)
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(address)
    listening.listen(64)
    print("ready", flush=True)
    with selectors.DefaultSelector() as events:
        events.register(listening, selectors.EVENT_READ)
        events.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is listening:
                    connection, _ = listening.accept()
                    if (words := _fork(connection, events)) is not None:
                        listening.close()
                        return words
                else:
                    pid, connection = key.data
                    events.unregister(key.fileobj)
                    os.close(key.fd)
                    _, status = os.waitpid(pid, 0)
                    with contextlib.suppress(OSError), connection:
                        connection.sendall(str(status).encode())


def _fork(connection: socket.socket, events: selectors.BaseSelector) -> list[str] | None:
    """Fork; in the copy, become the command that is asked for and return its words."""
    size, files, _, _ = socket.recv_fds(connection, 8, 2)
    with connection.makefile("rb") as stream:
        request = json.loads(stream.read(int.from_bytes(size, "little")))
    pid = os.fork()
    if pid:
        for file in files:
            os.close(file)
        connection.sendall(str(pid).encode())
        events.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
        return None
    os.setsid()
    for key in list(events.get_map().values()):
        if key.data:
            os.close(key.fd)
            key.data[1].close()
    connection.close()
    null = os.open(os.devnull, os.O_RDONLY)
    for given, number in ((null, 0), (files[0], 1), (files[1], 2)):
        os.dup2(given, number)
        os.close(given)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    return list(request["words"])


if __name__ == "__main__":
    typed = serve(sys.argv[1])
    if typed is not None:
        sys.argv = ["frontalis", *typed]
        runpy.run_module("frontalis", run_name="__main__", alter_sys=True)
