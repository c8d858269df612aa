"""One release opened for queries: its indexes, rows, models and error rates, each read on first use and kept.

It is read from one commit, so a run that publishes meanwhile is never seen half. Searching is `tasks.query.search`.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import numpy as np
import pyarrow as pa

from schemas.errors import SettingsError
from schemas.metrics import RAW
from schemas.releases import IndexRef, Release
from schemas.reports import ScoreFmr
from storage.location import Location
from storage.releases import Releases
from storage.tombstones import Tombstones
from storage.vectors.index import VectorIndex
from storage.vectors.store import open_ids, open_index
from tasks.query.rates import ReleaseRates, fmr_at, release_rates, threshold_at
from tasks.query.rows import StoredRows
from tasks.query.search import Index, Neighbours, SearchOptions

if TYPE_CHECKING:
    from models.inference import Reweighter

T = TypeVar("T")


class OpenRelease:
    """One release of a store. Threads may share it, and it does not change when another release is served.

    Attributes:
        store: where it is.
        record: the release record.
    """

    def __init__(self, store: Location, record: Release) -> None:
        self.store, self.record = store, record
        self._lock = threading.RLock()
        self._parts: dict[tuple[str, str], Any] = {}

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that can be searched, raw included."""
        return tuple(self.record.indexes)

    @property
    def default_expand(self) -> int:
        """`[query] expand` of the release: how many rows expand a query that does not say."""
        return int(self.record.settings.get("query", {}).get("expand", 0))

    def index(self, mode: str) -> Index:
        """Return the index of a mode.

        Raises:
            SettingsError: the release has no such mode.
            StoreError: the index is damaged or missing.
        """
        return self._part(
            "index",
            mode,
            lambda: Index(self.record.release, mode, self._vectors(mode), self.rows(mode), self.default_expand),
        )

    def rows(self, mode: str) -> StoredRows:
        """Return the rows of a mode. Raises as `index`."""
        reference = self._reference(mode)
        return self._part(
            "rows", mode, lambda: StoredRows(self.store, self.record, mode, open_ids(self.store, reference))
        )

    def neighbours(
        self,
        mode: str,
        ids: Sequence[str | int],
        k: int,
        *,
        include_self: bool = False,
        **options: Unpack[SearchOptions],
    ) -> Neighbours:
        """Return the `k` nearest rows of stored ids; the options are those of `Index.search`.

        Args:
            mode: of the index.
            ids: as typed or as stored.
            k: neighbours of each.
            include_self: whether a row may find itself.

        Raises:
            SettingsError: an unknown mode, id or option.
            StoreError: a file of the store is damaged or missing.
        """
        found = self.rows(mode).find(ids)
        return self.neighbours_at(mode, found, k, include_self=include_self, **options)

    def neighbours_at(
        self, mode: str, rows: np.ndarray, k: int, *, include_self: bool = False, **options: Unpack[SearchOptions]
    ) -> Neighbours:
        """Return the `k` nearest rows of stored rows, given by their numbers. Raises as `neighbours`."""
        index = self.index(mode)
        if not include_self:
            options.setdefault("exclude_self_ids", self.rows(mode).ids.take(pa.array(rows)).to_pylist())
        return index.search(index.vectors_at(rows), k, **options)

    def reweight(self, mode: str, embeddings: np.ndarray) -> np.ndarray:
        """Return the features `[n, D]` of new embeddings `[n, D]` by the model of this release; `raw` returns them.

        Raises:
            SettingsError: the release has no such mode, or the embeddings have another length.
            BadModelError: the model is damaged, or a feature is not finite.
        """
        dim = self._reference(mode).dim
        embeddings = np.ascontiguousarray(embeddings, np.float32)
        if embeddings.ndim != 2 or embeddings.shape[1] != dim:
            raise SettingsError(f"embeddings have shape {list(embeddings.shape)}, mode {mode} wants [n, {dim}].")
        if mode == RAW:
            return embeddings
        return self._model(mode).query(embeddings)

    def threshold(self, mode: str, fmr: float | str) -> float:
        """Return the score from which a pair matches with an FMR of at most `fmr`, as measured for this release.

        Raises:
            SettingsError: `fmr` is no rate, or smaller than what was measured.
            StoreError: the release was not measured.
        """
        return threshold_at(self.rates(mode), fmr, f"{self.record.release}, {mode}")

    def fmr(self, mode: str, scores: Any) -> Any:
        """Return the FMR at a score, or at an array of scores: at most so many impostor pairs score as high.

        Raises:
            SettingsError: the release has no such mode.
            StoreError: the release was not measured.
        """
        return fmr_at(self.rates(mode), scores)

    def rates(self, mode: str) -> ScoreFmr:
        """Return the FMR by score of a mode. Raises as `fmr`."""
        self._reference(mode)
        return self.load_rates().of(mode)

    def load_rates(self) -> ReleaseRates:
        """Read the FMR by score of all modes. Raises StoreError where the evaluation is damaged."""
        return self._part("rates", "", lambda: release_rates(self.store, self.record))

    def reuse(self, other: "OpenRelease") -> None:
        """Open what `other` has open, and take over indexes and models that are the same in both. Raises as `index`."""
        opened, before, now = list(other._parts.items()), other.record, self.record
        for (what, mode), part in opened:
            if (what == "vectors" and now.indexes.get(mode) == before.indexes[mode]) or (
                what == "model" and now.models.get(mode) == before.models[mode]
            ):
                self._parts[what, mode] = part
        for (what, mode), _ in opened:
            if what == "index" and mode in now.indexes:
                self.index(mode)
            elif what == "model" and mode in now.models:
                self._model(mode)
            elif what == "rates":
                self.load_rates()

    def _vectors(self, mode: str) -> VectorIndex:
        reference = self._reference(mode)
        return self._part("vectors", mode, lambda: open_index(self.store, reference))

    def _model(self, mode: str) -> "Reweighter":
        return self._part("model", mode, lambda: self._load_model(mode))

    def _load_model(self, mode: str) -> "Reweighter":
        # Only new embeddings need a network: a query by id must not wait for torch to load.
        from models.inference import Reweighter
        from tasks.checkpoints import stored_checkpoint

        model = self.record.models[mode]
        return Reweighter(stored_checkpoint(self.store, model), statistic=model.statistic)

    def _reference(self, mode: str) -> IndexRef:
        reference = self.record.indexes.get(mode)
        if reference is None:
            raise SettingsError(f"mode {mode}: release {self.record.release} has {', '.join(self.modes)}.")
        return reference

    def _part(self, what: str, mode: str, read: Callable[[], T]) -> T:
        found = self._parts.get((what, mode))
        if found is None:
            with self._lock:
                found = self._parts.get((what, mode))
                if found is None:
                    found = self._parts[what, mode] = read()
        return found


def open_release(store: str, release: str | None = None) -> OpenRelease:
    """Open the release that is served, or one by name.

    Raises:
        SettingsError: no store there, or no such release.
        StoreError: nothing is served yet, or the store is damaged.
    """
    history = Releases.of(Location(store))
    record = history.servable(release) if release else history.serving()
    Tombstones.proven(history.store, history.all())
    return OpenRelease(history.store, record)
