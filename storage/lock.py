"""One run at a time on a store.

Locally an advisory lock on `.lock`, which the operating system frees with the process, however it ends. Object storage
has no such lock: there the commits themselves refuse the second writer (`storage.tables`).
"""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from schemas.errors import StoreBusyError, StoreError
from storage.layout import LOCK
from storage.location import Location, make_folder

log = logging.getLogger("frontalis.lock")

POLL_SECONDS = 0.2


@contextlib.contextmanager
def store_lock(store: Location, what: str, wait: float = 0.0) -> Iterator[None]:
    """Lock the store for one run; log at once if that has to wait, and for whom.

    Args:
        store: the store.
        what: what the run does, for the message that another run shows.
        wait: seconds to wait for a run that has the lock.

    Raises:
        StoreBusyError: another run still has the lock after `wait` seconds; names that run.
        StoreError: the store cannot be written, or is on a disk without file locks.
    """
    if not store.is_local:
        yield
        return
    path = Path(store.path) / LOCK
    is_new = not path.parent.exists()
    lock = FileLock(path, poll_interval=POLL_SECONDS)
    try:
        make_folder(path.parent)
        _acquire(lock, path, store, wait)
    except Timeout as error:
        raise StoreBusyError(
            f"{store.uri}: held by another run ({_holder(path)}); wait for it, or pass --wait SECONDS."
        ) from error
    except OSError as error:
        raise StoreError(
            f"{store.uri}: cannot be locked ({error.strerror}); it needs write permission on a disk with file locks."
        ) from error
    try:
        with contextlib.suppress(OSError):  # a full disk must not stop a run that could free it
            path.write_text(json.dumps({"what": what, "pid": os.getpid(), "host": socket.gethostname()}))
        yield
    except BaseException:
        if is_new:
            _remove_empty(path)
        raise
    finally:
        lock.release()


def _remove_empty(path: Path) -> None:
    """Remove a folder that holds nothing but the lock: a refused run leaves no folder that looks like a store.

    Whoever waits for the lock meanwhile notices that its file is gone, and makes another one.
    """
    with contextlib.suppress(OSError):
        if [file.name for file in path.parent.iterdir()] == [LOCK]:
            path.unlink()
            path.parent.rmdir()


def _acquire(lock: FileLock, path: Path, store: Location, wait: float) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise
        log.info("%s: waiting up to %.10g s for %s", store.uri, wait, _holder(path))
        lock.acquire(timeout=wait)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"{holder['what']}, process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
