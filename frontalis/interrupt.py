"""Ends a command within seconds of Ctrl-C or SIGTERM, whatever it is doing.

A signal becomes an `Interrupt` in the main thread, and the work unwinds: temporary files go, Prefect learns of
it, locks are freed. A long call into compiled code (training an index, a large matrix product) does not notice; a
watching thread, woken by the signal itself, then ends the process and those it started. Both are safe at any moment:
what a run leaves is either complete under its final name or will be done again.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

GRACE_SECONDS = 8.0
ASKING_SECONDS = 3.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt(BaseException):
    """Ctrl-C or SIGTERM; `exit_code` is 128 + the signal, as shells have it.

    No `KeyboardInterrupt`, which the library that reads the command line would turn into a silent exit.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@dataclass
class Watched:
    """Work that may be interrupted.

    `grace` is how many seconds it may take to stop, `kept` says what it leaves then; both may be set while it runs.
    `signal` is the one that came, None as long as there is none.
    """

    grace: float
    kept: Callable[[], str] = lambda: "nothing was changed"
    signal: int | None = None

    def said(self) -> str:
        """Return what is left, in words, soon and whatever `kept` does: it may ask a storage that does not answer."""
        found = ["what is complete is kept"]

        def ask() -> None:
            with contextlib.suppress(Exception):
                found.append(self.kept())

        asking = threading.Thread(target=ask, name="frontalis-kept", daemon=True)
        asking.start()
        asking.join(ASKING_SECONDS)
        return found[-1]


@contextlib.contextmanager
def stops_within(seconds: float = GRACE_SECONDS) -> Iterator[Watched]:
    """Let the block stop cleanly on SIGINT or SIGTERM, and end the process where that takes longer than `seconds`.

    Only for the main thread. Raises `Interrupt` in the block. Where that leaves the block, the process is to end: its
    children are ended, further signals ignored, and the watch goes on.
    """
    watched = Watched(seconds)
    reader, writer = socket.socketpair()
    reader.setblocking(True)
    writer.setblocking(False)
    handlers = {number: signal.signal(number, _raise) for number in SIGNALS}
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(reader, over, watched), name="frontalis-interrupt", daemon=True)
    watch.start()
    interrupted = False
    try:
        yield watched
    except Interrupt:
        interrupted = True
        raise
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if interrupted else handler)
        writer.close()
        if interrupted:
            _end_children()
        else:
            over.set()
            watch.join()
            reader.close()


def _raise(number: int, _: FrameType | None) -> None:
    raise Interrupt(number)


def _watch(reader: socket.socket, over: threading.Event, watched: Watched) -> None:
    """Wait for the byte that Python's own handler writes at once, even while the main thread is in compiled code."""
    while byte := reader.recv(1):
        if byte[0] in SIGNALS:
            watched.signal = byte[0]
            if not over.wait(watched.grace):
                _end_children()
                print(  # noqa: T201
                    f"frontalis: interrupted in the middle of a long step; {watched.said()}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(128 + byte[0])
            return


def _end_children() -> None:
    """End the processes that this one started, such as Prefect's temporary server, which would outlive it."""
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in file.read_text().split():
                os.kill(int(child), signal.SIGTERM)
