"""One run at a time on a store, whatever ends the run that holds it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.errors import StoreBusyError, StoreError
from storage.location import Location
from storage.lock import store_lock

HOLD = """
import sys, time
from storage.location import Location
from storage.lock import store_lock
with store_lock(Location(sys.argv[1]), "vacuum"):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def store(tmp_path: Path) -> Location:
    return Location(str(tmp_path / "store"))


@contextlib.contextmanager
def holder(store: Location) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the store."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, store.uri], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def take(store: Location, wait: float = 0.0) -> None:
    with store_lock(store, "reprocess", wait):
        pass


def test_one_after_another(store: Location) -> None:
    take(store)
    take(store)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_held_store_is_refused_by_name_until_its_holder_ends(store: Location, number: int) -> None:
    with holder(store) as process:
        with pytest.raises(StoreBusyError, match=rf"held by another run \(vacuum, process {process.pid} on .+\); wait"):
            take(store)
        os.kill(process.pid, number)
        process.wait()
        take(store)


def test_a_run_that_fails_frees_the_store(store: Location) -> None:
    def fail() -> None:
        with store_lock(store, "reprocess"):
            raise KeyError("a defect")

    with pytest.raises(KeyError):
        fail()
    take(store)


def test_two_threads_of_one_process_are_two_runs(store: Location) -> None:
    with store_lock(store, "forget"), pytest.raises(StoreBusyError, match="forget, process"):
        take(store)


def test_waiting_says_so_and_takes_over_as_soon_as_the_store_is_free(
    store: Location, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "frontalis.lock")
    take(store, wait=60)
    assert caplog.messages == [], "nobody holds the store"
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with store_lock(store, "forget"):
            held.set()
            free.wait(60)

    first = threading.Thread(target=hold)
    first.start()
    held.wait(60)
    threading.Timer(0.3, free.set).start()
    take(store, wait=60)
    assert free.is_set()
    (said,) = caplog.messages
    assert said.startswith(f"{store.uri}: waiting up to 60 s for forget, process {os.getpid()} on ")
    first.join()


def test_waiting_ends(store: Location) -> None:
    with store_lock(store, "forget"), pytest.raises(StoreBusyError):
        take(store, wait=0.5)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"what": "x"}'])
def test_a_holder_that_left_no_name_is_unknown(store: Location, content: str) -> None:
    with store_lock(store, "forget"):
        (Path(store.path) / ".lock").write_text(content)
        with pytest.raises(StoreBusyError, match=r"held by another run \(unknown\)"):
            take(store)


def test_a_lock_whose_process_id_was_used_again_is_free(store: Location) -> None:
    """The name in the file is for messages: what holds the store is the lock, which ends with its process."""
    take(store)
    living = {"what": "reprocess", "pid": os.getppid(), "host": socket.gethostname()}
    (Path(store.path) / ".lock").write_text(json.dumps(living))
    take(store)


def test_a_store_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"file/store: cannot be locked \(.+\); it needs write permission"):
        take(Location(str(tmp_path / "file/store")))
