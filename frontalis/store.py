"""A store opened for queries from Python: `frontalis.open_store(uri)`.

It needs no Prefect. The work is done by `tasks.query`, which the command line, the flow and the service use as well.
"""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np

from schemas.releases import Release
from tasks.query.opened import OpenRelease, open_release
from tasks.query.search import Index, Neighbours, SearchOptions


class Store:
    """A store, pinned to one release until `refresh`: answers never mix two releases. Threads may share it.

    An `Index` or `opened` that was taken before a `refresh` goes on answering from its own release.

    Args:
        uri: local path or s3://…
        release: a release by name; None takes the one that is served.

    Raises:
        SettingsError: no store there, or no such release.
        StoreError: nothing is served yet, or the store is damaged.

    Example:
        >>> with frontalis.open_store("STORE") as store:  # doctest: +SKIP
        ...     features = store.reweight("per_sample", embeddings)  # float32 [n, D], as the recogniser gives them
        ...     found = store.index("per_sample").search(features, k=10)
        ...     matches = found.scores >= store.threshold("per_sample", 1e-3)
    """

    def __init__(self, uri: str, release: str | None = None) -> None:
        self._uri, self._name = uri, release
        self._refreshing = threading.Lock()
        self._opened: OpenRelease | None = open_release(uri, release)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of indexes and models; whoever still uses them keeps them."""
        self._opened = None

    @property
    def opened(self) -> OpenRelease:
        """The release that the store is pinned to. Take it once where several calls have to be of one release."""
        if self._opened is None:
            raise ValueError("the store is closed")
        return self._opened

    @property
    def release(self) -> Release:
        """The record of the release."""
        return self.opened.record

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that can be searched, raw included."""
        return self.opened.modes

    def refresh(self) -> bool:
        """Pin the store to the release that is served now, and return whether that is another one.

        What was open is opened in the new release first, and unchanged indexes are shared; meanwhile other threads are
        answered from the old one. After an error the store stays at the old one.

        Raises:
            SettingsError: the release by name can no longer be served.
            StoreError: the store is damaged.
        """
        with self._refreshing:
            old = self.opened
            new = open_release(self._uri, self._name)
            if new.record.as_retired() == old.record.as_retired():
                return False
            new.reuse(old)
            self._opened = new
            return True

    def index(self, mode: str) -> Index:
        """Return the index of a mode: `.search(vectors, k, …)`.

        Raises:
            SettingsError: the release has no such mode.
            StoreError: the index is damaged or missing.
        """
        return self.opened.index(mode)

    def neighbours(
        self,
        mode: str,
        ids: Sequence[str | int],
        k: int = 10,
        *,
        include_self: bool = False,
        **options: Unpack[SearchOptions],
    ) -> Neighbours:
        """Return the `k` nearest rows of stored ids; the options are those of `Index.search`.

        Args:
            mode: of the index.
            ids: as stored; of text ids other forms (blanks, composition of characters) are found, too.
            k: neighbours of each.
            include_self: whether a row may find itself.

        Raises:
            SettingsError: an unknown mode, id or option.
            StoreError: a file of the store is damaged or missing.
        """
        return self.opened.neighbours(mode, ids, k, include_self=include_self, **options)

    def reweight(self, mode: str, embeddings: np.ndarray) -> np.ndarray:
        """Return the features of new embeddings, float32 `[n, D]`, by the release's own model; `raw` returns them.

        Raises:
            SettingsError: an unknown mode, or embeddings of another length.
            BadModelError: the model is damaged, or a feature is not finite.
        """
        return self.opened.reweight(mode, embeddings)

    def threshold(self, mode: str, fmr: float | str) -> float:
        """Return the score from which a pair matches with an FMR of at most `fmr`, as measured for the release.

        It holds for scores of two rows; not for templates (`by="subject"`) and expanded queries.

        Raises:
            SettingsError: `fmr` is no rate, or smaller than what was measured.
            StoreError: the release was not measured.
        """
        return self.opened.threshold(mode, fmr)

    def fmr(self, mode: str, score: Any) -> Any:
        """Return the FMR at a score or an array of scores: at most this share of impostor pairs score as high.

        The resolution is ten FMRs a decade; of two, the larger one is returned. Raises as `threshold`.
        """
        return self.opened.fmr(mode, score)


def open_store(uri: str, release: str | None = None) -> Store:
    """Open a store for queries; see `Store`."""
    return Store(uri, release)
