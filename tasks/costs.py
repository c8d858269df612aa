"""What the stages of a run take: time, CPU time, rows and memory, for the release record and the report."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from schemas.reports import StageCost

log = logging.getLogger("frontalis.stages")

SAMPLE_SECONDS = 0.05


class Costs:
    """Measures the stages of one run of this process; a context, so that its sampling of memory ends with the run.

    CPU time and memory are those of the whole process. Workers in other processes are not in them.

    >>> with Costs() as costs, costs.stage("plan") as stage:
    ...     stage.rows = 100
    >>> costs.stages[0].stage, costs.stages[0].rows
    ('plan', 100)
    """

    def __init__(self) -> None:
        self.stages: list[StageCost] = []
        self._open: list[OpenStage] = []
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="frontalis-memory", daemon=True)

    def __enter__(self) -> Self:
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._sampler.join()

    @contextmanager
    def stage(self, name: str) -> Iterator["OpenStage"]:
        """Measure what happens inside; a stage that raises is not recorded."""
        log.info("%s: started", name, extra={"stage": name})
        stage = OpenStage(resident_bytes())
        self._open.append(stage)
        started, used = time.monotonic(), time.process_time()
        try:
            yield stage
            seconds, cpu = time.monotonic() - started, time.process_time() - used
            stage.see(resident_bytes())
            peak = None if stage.peak is None else round(stage.peak / 1e6)
            self.stages.append(
                StageCost(stage=name, seconds=seconds, cpu_seconds=cpu, rows=stage.rows, peak_megabytes=peak)
            )
        finally:
            self._open.remove(stage)

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            if self._open:
                now = resident_bytes()
                for stage in tuple(self._open):
                    stage.see(now)


class OpenStage:
    """A stage that runs; set `rows` to the number of rows it works on."""

    def __init__(self, resident: int | None) -> None:
        self.rows: int | None = None
        self.peak = resident

    def see(self, resident: int | None) -> None:
        """Take the memory of the process at some moment."""
        if resident is not None:
            self.peak = max(self.peak or 0, resident)


def resident_bytes() -> int | None:
    """Return the resident memory of this process; None where the system has no `/proc`."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
