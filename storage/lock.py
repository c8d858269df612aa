"""One run at a time on a store.

Locally an advisory lock on `.lock`, which the operating system frees with the process, however it ends. Object storage
has no such lock: there the commits themselves refuse the second writer (`storage.tables`).
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import StoreBusyError, StoreError
from storage.layout import LOCK
from storage.location import Location

POLL_SECONDS = 0.2


@contextlib.contextmanager
def store_lock(store: Location, what: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the store for one run.

    Args:
        store: the store.
        what: what the run does, for the message that another run sees.
        wait: seconds to wait for a run that holds it.

    Raises:
        StoreBusyError: another run holds it still after `wait` seconds; names that run.
        StoreError: the store cannot be written, or lies on a disk without file locks.
    """
    if not store.is_local:
        yield
        return
    path = Path(store.path) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise StoreError(f"{store.uri}: cannot be written ({error.strerror}); mend permissions or disk.") from error
    with file:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise StoreBusyError(
                        f"{store.uri}: held by another run ({_holder(path)}); wait for it, or pass --wait SECONDS."
                    ) from error
                time.sleep(POLL_SECONDS)
            except OSError as error:
                raise StoreError(f"{store.uri}: its disk has no file locks ({error.strerror}); use another.") from error
        with contextlib.suppress(OSError):  # a full disk must not stop a run that could free it
            file.truncate(0)
            file.write(json.dumps({"what": what, "pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
        yield


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text())
        return f"{held['what']}, process {held['pid']} on {held['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
