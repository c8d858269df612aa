"""Concurrent queries in one search of the index.

While an index is searched, further requests wait; then all that ask alike are searched together. An idle service adds
no delay. Requests are alike if release, mode, k and all options are equal, so an answer does not depend on what else
is asked for. Requests that read stored columns or search templates have a thread of their own: the others do not wait
for them.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from frontalis.service.limits import OverloadedError
from frontalis.service.metrics import Metrics
from tasks.query.opened import OpenRelease
from tasks.query.search import Neighbours, SearchOptions

LARGEST = 1024
"""Queries in one search; a request of more is searched alone."""


@dataclass(frozen=True)
class Found:
    """The queries of a job, as stored, and their neighbours."""

    names: Sequence[str | int]
    subjects: Sequence[str | None]
    neighbours: Neighbours


@dataclass(frozen=True)
class Job:
    """The queries of one request in one mode: stored ids, or checked raw embeddings `[n, D]`."""

    opened: OpenRelease
    mode: str
    k: int
    options: SearchOptions
    ids: Sequence[str | int] = ()
    embeddings: np.ndarray | None = None
    include_self: bool = False
    future: "Future[Found]" = field(default_factory=Future)

    def __len__(self) -> int:
        return len(self.ids) if self.embeddings is None else len(self.embeddings)

    @property
    def is_heavy(self) -> bool:
        """Whether stored columns are read, or templates made."""
        options = self.options
        return bool(options.get("where") or options.get("columns") or options.get("by") == "subject")

    @property
    def kind(self) -> tuple[object, ...]:
        """What is equal for jobs that can be searched together."""
        excludes = self.embeddings is None and not self.include_self
        return (id(self.opened), self.mode, self.k, excludes, *(repr(one) for one in sorted(self.options.items())))


class Batcher:
    """Two threads that search, and the jobs that wait for them."""

    def __init__(self, metrics: Metrics, waiting: int) -> None:
        self._metrics, self._most = metrics, waiting
        self._lanes = [_Lane(metrics, f"search-{name}") for name in ("plain", "columns")]

    def submit(self, job: Job) -> "Future[Found]":
        """Queue a job; its future gives the answer, or the error of this job alone.

        Raises:
            OverloadedError: too many queries wait.
        """
        if sum(lane.waiting for lane in self._lanes) + len(job) > self._most:
            raise OverloadedError(f"more than {self._most:,} queries wait; try again later.")
        self._lanes[job.is_heavy].put(job)
        return job.future

    def close(self) -> None:
        """Answer what waits, then end the threads."""
        for lane in self._lanes:
            lane.close()


class _Lane:
    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics = metrics
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.waiting = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        with self._changed:
            self._jobs.append(job)
            self._count(len(job))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _count(self, queries: int) -> None:
        self.waiting += queries
        self._metrics.waiting.inc(queries)

    def _run(self) -> None:
        while jobs := self._take():
            wanted = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if wanted:
                self._answer(wanted)

    def _take(self) -> list[Job]:
        """Return the oldest job and those that ask alike, as they came; nothing once the lane is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            taken, left, size = list[Job](), deque[Job](), 0
            for job in self._jobs:
                if not taken or (size + len(job) <= LARGEST and job.kind == taken[0].kind):
                    taken.append(job)
                    size += len(job)
                else:
                    left.append(job)
            self._jobs = left
            self._count(-size)
            return taken

    def _answer(self, jobs: list[Job]) -> None:
        try:
            found = search(jobs)
        except Exception as error:  # the futures of these jobs raise it
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
            else:  # one of them is at fault; the others must not suffer
                for job in jobs:
                    self._answer([job])
            return
        size = sum(map(len, jobs))
        self._metrics.batches.observe(size)
        self._metrics.queries.labels(jobs[0].mode).inc(size)
        for job, one in zip(jobs, found, strict=True):
            job.future.set_result(one)


def search(jobs: Sequence[Job]) -> list[Found]:
    """Answer jobs of one kind with one search.

    Raises:
        SettingsError: an id or option of one of them cannot be used.
        StoreError: a file of the store is damaged or missing.
    """
    first = jobs[0]
    opened, mode, options = first.opened, first.mode, first.options.copy()
    index, rows = opened.index(mode), opened.rows(mode)
    if columns := options.get("columns"):
        rows.keep(columns)
    vectors: list[np.ndarray] = [np.empty(0)] * len(jobs)
    named: list[tuple[Sequence[str | int], Sequence[str | None]]] = []
    excluded: list[str | int | None] = []
    raw = [at for at, job in enumerate(jobs) if job.embeddings is not None]
    if raw:
        features = opened.reweight(mode, np.concatenate([jobs[at].embeddings for at in raw]))
        ends = np.cumsum([len(jobs[at]) for at in raw])[:-1]
        for at, part in zip(raw, np.split(features, ends), strict=True):
            vectors[at] = part
    for at, job in enumerate(jobs):
        if job.embeddings is not None:
            named.append((range(len(job)), [None] * len(job)))
            excluded += [None] * len(job)
            continue
        numbers = rows.find(job.ids)
        known = rows.columns(["id", "subject"], numbers)
        names = known["id"].to_pylist()
        named.append((names, known["subject"].to_pylist()))
        excluded += [None] * len(job) if job.include_self else names
        vectors[at] = index.vectors_at(numbers)
    if any(one is not None for one in excluded):
        options["exclude_self_ids"] = excluded
    found = index.search(np.concatenate(vectors), first.k, **options)
    answers, start = [], 0
    for job, (names, subjects) in zip(jobs, named, strict=True):
        answers.append(Found(names, subjects, found.part(start, start + len(job))))
        start += len(job)
    return answers
