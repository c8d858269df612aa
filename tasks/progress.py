"""The progress of reweighting: rows done of all rows, their rate, and the time that is left."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence

from tasks.plan import ShardWork
from tasks.reweight import stopping

log = logging.getLogger("frontalis.reprocess")

LOG_SECONDS = 1.0


class Progress:
    """Logs at most once a second how far the groups of a plan are, and where a run was stopped."""

    def __init__(self, groups: Sequence[Sequence[ShardWork]]) -> None:
        self.total = sum(work.rows for group in groups for work in group)
        self.done = 0
        self._started = self._logged = time.monotonic()

    def add(self, group: Sequence[ShardWork]) -> None:
        """Count a group as done."""
        self.done += sum(work.rows for work in group)
        now = time.monotonic()
        if now - self._logged > LOG_SECONDS or self.done == self.total:
            rate = self.done / max(now - self._started, 1e-9)
            log.info("reweight: %s of %s rows, %s rows/s, %.0f s left", f"{self.done:,}", f"{self.total:,}",
                     f"{rate:,.0f}", (self.total - self.done) / rate,
                     extra={"stage": "reweight", "done": self.done, "total": self.total})  # fmt: skip
            self._logged = now

    @contextlib.contextmanager
    def stopped_together(self) -> Iterator[None]:
        """Let whatever ends the block early stop the groups that are worked on, at their next block of rows."""
        stop = threading.Event()
        stopping.set(stop)
        try:
            yield
        except BaseException:  # Ctrl-C, SIGTERM, a cancelled run, a group that failed for good
            stop.set()
            log.warning("reweight: stopped; %s of %s rows are done and kept", f"{self.done:,}", f"{self.total:,}")
            raise
