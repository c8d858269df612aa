"""The release that answers, and the step to the next one while requests are being answered.

A request takes `opened` once, so its answer is of one release. The next release is opened beside the old one, and
unchanged indexes are shared.
"""

import logging
import threading

import numpy as np

from frontalis.service.metrics import Metrics
from frontalis.store import Store
from schemas.errors import FrontalisError, StoreError
from schemas.metrics import RAW
from schemas.releases import Release
from storage.location import Location
from storage.releases import Releases
from tasks.query.opened import OpenRelease

log = logging.getLogger("frontalis")


class Served:
    """The served release of a store, all of it loaded. Threads may share it.

    Raises:
        SettingsError: no store there.
        StoreError: nothing is served yet, or the store is damaged.
    """

    def __init__(self, uri: str, metrics: Metrics) -> None:
        self._location, self._metrics = Location(uri), metrics
        self._store = Store(uri)
        self._withdrawn: str | None = None
        self._refreshing = threading.Lock()
        opened = self._store.opened
        for mode in opened.modes:
            opened.index(mode)
            if mode != RAW:
                opened.reweight(mode, np.ones((1, opened.index(mode).dim), np.float32))
        opened.load_rates()
        self._announce(opened)

    @property
    def opened(self) -> OpenRelease:
        """The release that answers; a request takes it once.

        Raises:
            StoreError: it holds a person who was forgotten since, and the next one could not be read.
        """
        if self._withdrawn is not None:
            raise StoreError(self._withdrawn)
        return self._store.opened

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered."""
        return self._withdrawn is None

    def refresh(self) -> bool:
        """Go to the release that is served now, and return whether it is another one.

        After an error the old release goes on answering, unless somebody in it was forgotten.

        Raises:
            FrontalisError: the served release cannot be read.
        """
        with self._refreshing:
            before = self._store.opened.record.release
            try:
                changed = self._store.refresh()
            except FrontalisError as error:
                self._metrics.refresh_errors.inc()
                if self._is_erased(before):
                    self._withdrawn = f"release {before} holds a person who was forgotten since; the next: {error}"
                raise
            self._withdrawn = None
            changed = changed and self._store.opened.record.release != before
            if changed:
                self._announce(self._store.opened)
            return changed

    def history(self) -> list[Release]:
        """Return the release history, oldest first. Raises StoreError where it cannot be read."""
        return Releases.of(self._location).all()

    def _is_erased(self, release: str) -> bool:
        try:
            return any(one.release == release and one.erased for one in self.history())
        except FrontalisError:
            return False

    def _announce(self, opened: OpenRelease) -> None:
        record = opened.record
        rows = {mode: len(opened.index(mode)) for mode in opened.modes}
        self._metrics.answers_from(record.release, record.number, rows)
        log.info("release %s answers: %s rows in %s", record.release, f"{max(rows.values()):,}", ", ".join(rows))
