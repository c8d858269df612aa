"""From a request to its answer: limits, audit, the search in each mode, and what the scores mean.

All modes of an answer are of one release. Where a file of it was removed meanwhile, the request is answered from the
release that is served then.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from frontalis.service.audit import Audit
from frontalis.service.batching import Batcher, Job
from frontalis.service.limits import Limits
from frontalis.service.requests import ALL_MODES, Options, SearchAnswer
from frontalis.service.served import Served
from schemas.errors import SettingsError, StoreError
from storage.query_vectors import check_vectors
from tasks.query.answers import ModeAnswer, Question, all_modes, answered
from tasks.query.opened import OpenRelease

T = TypeVar("T")
INLINE = 2_000
"""Neighbours that are written on the event loop, and vectors' numbers that are read there: some milliseconds."""


class Answering:
    """Answers requests from the served release."""

    def __init__(self, served: Served, batcher: Batcher, limits: Limits, audit: Audit) -> None:
        self._served, self._batcher = served, batcher
        self._limits, self._audit = limits, audit
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="answer")

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run blocking work beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def answer(self, options: Options, ids: list[str | int], embeddings: np.ndarray | None, client: str) -> bytes:
        """Return the answer as JSON.

        Raises:
            UnknownIdError: an id is not stored.
            SettingsError: an option, id or vector that cannot be used, or more than the limits allow.
            OverloadedError: too many queries wait.
            StoreError: a file of the store is damaged or missing, or the audit log cannot be written.
        """
        if bool(ids) == (embeddings is not None):
            raise SettingsError("pass either ids or vectors.")
        release = self._served.opened.record.release
        try:
            return await self._answer(options, ids, embeddings, client)
        except StoreError:
            await self.in_thread(self._served.refresh)
            if self._served.opened.record.release == release:
                raise
        return await self._answer(options, ids, embeddings, client)

    async def _answer(
        self, options: Options, ids: list[str | int], embeddings: np.ndarray | None, client: str
    ) -> bytes:
        opened = self._served.opened
        modes = all_modes(opened) if options.mode == ALL_MODES else [options.mode]
        queries = len(ids) if embeddings is None else len(embeddings)
        self._limits.check(queries, options.k, len(modes))
        question = Question(["?"], None, options.k, options.include_self, False, options.fmr, options.search_options())
        for mode in modes:
            dim = opened.index(mode).dim
            if embeddings is not None:
                check_vectors("vectors", embeddings, dim)
            if question.fmr is not None:
                opened.threshold(mode, question.fmr)
        vectors = 0 if embeddings is None else queries
        self._audit.write(client, opened.record.release, modes, ids, vectors, options.where)
        parts = await asyncio.gather(*(self._in_mode(opened, mode, question, ids, embeddings) for mode in modes))

        def write() -> bytes:
            documents = {mode: make() for mode, make in zip(modes, parts, strict=True)}
            return SearchAnswer(release=opened.record.release, answers=documents).model_dump_json().encode()

        return write() if queries * options.k * len(modes) <= INLINE else await self.in_thread(write)

    async def _in_mode(
        self,
        opened: OpenRelease,
        mode: str,
        question: Question,
        ids: list[str | int],
        embeddings: np.ndarray | None,
    ) -> Callable[[], ModeAnswer]:
        job = Job(opened, mode, question.k, question.options, ids, embeddings, question.include_self)
        found = await asyncio.wrap_future(self._batcher.submit(job))
        return lambda: answered(opened, question, found.names, found.subjects, found.neighbours).mode_answer()

    def close(self) -> None:
        """End the threads."""
        self._batcher.close()
        self._threads.shutdown()
