"""The rows of one mode of a release: which id has which row, and their stored columns and vectors.

The id map of the index is in memory. Columns and vectors are read from the feature files when they are asked for.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import SettingsError, StoreError, UnknownIdError, clipped
from schemas.features import PARTITIONS, VECTOR_COLUMNS
from schemas.identity import normal_texts, parse_id
from schemas.releases import Release
from storage.features import READERS, features_table, matrix_of, opened, read_table, take_rows
from storage.ids import id_keys
from storage.location import Location
from storage.tables import LiveFile
from tasks.query.where import columns_of, matching

REMEMBERED = 16  # conditions whose rows are kept


class StoredRows:
    """The rows of one mode, numbered in the order of their keys. Threads may share it.

    Attributes:
        keys: int64 `[N]`, ascending; the labels of the index.
        ids: their ids, text or integers.
        subjects: their subjects, null where unknown.
        shards: the shard that holds each.
    """

    def __init__(self, store: Location, release: Release, mode: str, ids: pa.Table) -> None:
        ids = ids.combine_chunks()
        self.keys: np.ndarray = ids["key"].to_numpy()
        self.ids, self.subjects, self.shards = ids["id"], ids["subject"], ids["shard"]
        self._store, self._release, self._mode = store, release, mode
        self._table = features_table(store)
        self._lock = threading.Lock()
        self._whole: dict[str, pa.ChunkedArray] = {"id": self.ids, "subject": self.subjects, "shard": self.shards}
        self._matching: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def numbers(self, keys: np.ndarray) -> np.ndarray:
        """Return the number of the row of each key, of any shape; of key −1 that of any row."""
        return np.minimum(np.searchsorted(self.keys, keys), len(self) - 1)

    def find(self, ids: Sequence[str | int], shown: str = "id") -> np.ndarray:
        """Return the row of each id: of exactly this text, else of one that is equal after normalisation.

        Args:
            ids: as typed, or as stored.
            shown: what messages call an id.

        Raises:
            UnknownIdError: there is no such id.
            SettingsError: it has no usual form, or several ids have the same one.
        """
        integer = pa.types.is_integer(self.ids.type)
        names = [parse_id(str(one), integer=integer, shown=f"{shown} {clipped(one)}") for one in ids]
        rows = self.find_exactly(names if integer else [str(one) for one in ids])
        for at in np.flatnonzero(rows < 0).tolist():
            rows[at] = self._find_normal(ids[at], names[at], shown)
        return rows

    def find_exactly(self, ids: Sequence[str | int | None]) -> np.ndarray:
        """Return the row of each id, −1 where it is None, not stored, or of another type."""
        rows = np.full(len(ids), -1, np.int64)
        integer = pa.types.is_integer(self.ids.type)
        # An integer id and its digits are one id, whichever way a file holds it.
        known = [at for at, one in enumerate(ids) if one is not None]
        if not known or not len(self):
            return rows
        texts = pa.array([str(ids[at]) for at in known], pa.string())
        keys = id_keys(texts)
        found = np.minimum(np.searchsorted(self.keys, keys), len(self) - 1)
        stored = self.ids.take(pa.array(found))
        same = pc.equal(stored.cast(pa.string()) if integer else stored, texts).to_numpy()
        rows[known] = np.where((self.keys[found] == keys) & same, found, -1)
        return rows

    def _find_normal(self, typed: str | int, name: str | int, shown: str) -> int:
        release, store = self._release.release, self._store.uri
        if not pa.types.is_integer(self.ids.type):
            rows = np.flatnonzero(pc.equal(self._normal_ids, pa.scalar(name)).to_numpy())
            if len(rows) == 1:
                return int(rows[0])
            if len(rows):
                raise SettingsError(
                    f"{shown} {clipped(typed)}: {len(rows)} ids of release {release} differ from it only in blanks or "
                    "in how characters are composed; type one of them exactly."
                )
        raise UnknownIdError(f"{shown} {clipped(typed)}: is not in release {release} of {store}.")

    @cached_property
    def _normal_ids(self) -> pa.ChunkedArray:
        return normal_texts(self.ids)

    @cached_property
    def subject_codes(self) -> np.ndarray:
        """A code for each subject, int64 `[N]`; a row without subject has a negative code that no other row has."""
        encoded = self.subjects.combine_chunks().dictionary_encode()
        codes = pc.fill_null(encoded.indices, -1).to_numpy().astype(np.int64)
        return np.where(codes < 0, -1 - np.arange(len(codes)), codes)

    @cached_property
    def subject_names(self) -> list[str]:
        """The subjects, by their codes."""
        names: list[str] = self.subjects.combine_chunks().dictionary_encode().dictionary.to_pylist()
        return names

    @cached_property
    def shard_codes(self) -> np.ndarray:
        """A code for each shard, `[N]`."""
        codes: np.ndarray = self.shards.combine_chunks().dictionary_encode().indices.to_numpy()
        return codes

    @cached_property
    def column_names(self) -> list[str]:
        """The columns that can be shown and filtered by."""
        names = ["id", "subject", "shard"]
        for file in self._files.values():
            with opened(self._table, file) as parquet:
                stored = parquet.schema_arrow.names
            return names + [name for name in stored if name not in (*names, *VECTOR_COLUMNS, *PARTITIONS)]
        return names

    def check_columns(self, names: Sequence[str]) -> None:
        """Refuse names that are no columns with a SettingsError."""
        for name in names:
            if name not in self.column_names:
                known = ", ".join(self.column_names)
                raise SettingsError(f"column {clipped(name)}: is not stored; there are {known}.")

    def columns(self, names: Sequence[str], rows: np.ndarray) -> pa.Table:
        """Return some columns of some rows, in their order; row −1 is null. Only shards with such rows are read.

        Raises:
            SettingsError: a name is no column.
            StoreError: a feature file is damaged or missing.
        """
        self.check_columns(names)
        wanted, back = np.unique(rows[rows >= 0], return_inverse=True)
        whole = {name: self._whole[name].take(pa.array(wanted)) for name in names if name in self._whole}
        missing = [name for name in names if name not in whole]
        if missing:
            whole |= dict(zip(missing, self._read(missing, wanted).columns, strict=True))
        place = np.full(len(rows), -1, np.int64)
        place[rows >= 0] = back
        at = pa.array(place, mask=place < 0)
        return pa.table({name: whole[name].take(at) for name in names})

    def matching(self, condition: str) -> np.ndarray:
        """Return the rows, ascending, for which an SQL condition is true; see `tasks.query.where`. Raises as `columns`.

        The columns that it names are kept.
        """
        with self._lock:
            if condition not in self._matching:
                names = columns_of(condition, self.column_names)
                self._keep(names)
                table = pl.DataFrame({name: pl.from_arrow(self._whole[name]) for name in names})
                found = matching(condition, table)
                if len(self._matching) == REMEMBERED:
                    del self._matching[next(iter(self._matching))]
                self._matching[condition] = found
            return self._matching[condition]

    def keep(self, names: Sequence[str]) -> None:
        """Read some columns of all rows into memory, for whoever asks for them again and again. Raises as `columns`."""
        self.check_columns(names)
        with self._lock:
            self._keep(names)

    def _keep(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self._whole]
        if missing:
            read = self._read(missing, np.arange(len(self)))
            self._whole |= dict(zip(missing, read.columns, strict=True))

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the stored features `[n, D]` of some rows, as they were written, from the feature files.

        Raises:
            StoreError: a feature file is damaged or missing.
        """
        wanted, back = np.unique(rows, return_inverse=True)
        found = matrix_of(self._read(["front"], wanted)["front"], f"features of {self._release.release}")
        return found[back]

    def _read(self, names: Sequence[str], rows: np.ndarray) -> pa.Table:
        """Return columns of rows that ascend, read from the files of their shards."""
        codes = self.shard_codes[rows]
        order = np.argsort(codes, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []
        with ThreadPoolExecutor(READERS) as pool:
            read = list(
                pool.map(
                    lambda part: self._read_shard(self.shards[int(rows[part[0]])].as_py(), rows[part], names), parts
                )
            )
        if not read:
            return pa.table({name: pa.array([], pa.string()) for name in names})
        return pa.concat_tables(read, promote_options="default").take(pa.array(np.argsort(order)))

    def _read_shard(self, shard: str, rows: np.ndarray, names: Sequence[str]) -> pa.Table:
        file = self._files.get(shard)
        if file is None:
            raise self._disagree()
        keys = id_keys(read_table(self._table, [file], ["id"])["id"])
        order = np.argsort(keys)
        at = np.searchsorted(keys[order], self.keys[rows])
        if at.max(initial=-1) >= len(keys) or not np.array_equal(keys[order[at]], self.keys[rows]):
            raise self._disagree()
        in_file, back = np.unique(order[at], return_inverse=True)
        return take_rows(self._table, file, names, in_file).take(pa.array(back))

    @cached_property
    def _files(self) -> dict[str, LiveFile]:
        snapshot = self._table.snapshot(self._release.features_version)
        return {file.shard: file for file in snapshot.of_mode(self._mode)}

    def _disagree(self) -> StoreError:
        release = self._release.release
        return StoreError(f"{self._store.uri}: index and features of {release} disagree; run `frontalis verify`.")


def slices(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield `size` rows at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
