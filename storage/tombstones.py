"""Tombstones: salted hashes of forgotten ids and subjects, which keep their rows out while the source still has them.

The list contains no names: a tombstone is a keyed BLAKE2b hash under a random salt that never leaves the store. Taking
the rows out of the tables and indexes is left to `tasks.maintenance.forget`.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from schemas.errors import StoreError
from schemas.features import digest_of
from storage.layout import TOMBSTONES
from storage.location import Location


class Tombstones:
    """The tombstones of a store, loaded from `tombstones.json`; empty where there are none."""

    def __init__(self, store: Location) -> None:
        self.place = store / TOMBSTONES
        self.salt = secrets.token_hex(16)
        self.marks: frozenset[str] = frozenset()
        try:
            content = json.loads(self.place.read_bytes())
            self.salt, self.marks = bytes.fromhex(content["salt"]).hex(), frozenset(_texts(content["marks"]))
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            # Without the list the next run would publish forgotten people again.
            raise StoreError(f"{self.place.uri}: is damaged ({error}); restore it from a backup first.") from error

    def __bool__(self) -> bool:
        return bool(self.marks)

    @property
    def digest(self) -> str:
        """A digest of the list; part of what a shard's manifest depends on."""
        return digest_of(*sorted(mark.encode() for mark in self.marks))[:12] if self.marks else "none"

    def mark(self, kind: str, value: str) -> str:
        """Return the tombstone of an `id` or a `subject`."""
        key = bytes.fromhex(self.salt)
        return hashlib.blake2b(f"{kind}\0{value}".encode(), key=key, digest_size=16).hexdigest()

    def add(self, marks: Iterable[str]) -> None:
        """Add tombstones and write the list atomically."""
        self.marks = self.marks | set(marks)
        content = json.dumps({"salt": self.salt, "marks": sorted(self.marks)}).encode()
        self.place.write_bytes(content)

    def match(self, ids: pa.Array, subjects: pa.Array | None) -> tuple[np.ndarray, list[str]]:
        """Return which rows are forgotten (bool `[n]`) and which tombstones matched.

        Args:
            ids: string or int64 ids, nulls allowed.
            subjects: subjects of the same rows, or None where the shard has none.
        """
        rows = np.zeros(len(ids), bool)
        hits: set[str] = set()
        for kind, column in (("id", ids.cast(pa.string())), ("subject", subjects)):
            if column is None:
                continue
            encoded = column.dictionary_encode()
            marks = [None if value is None else self.mark(kind, value) for value in encoded.dictionary.to_pylist()]
            matched = np.array([mark in self.marks for mark in marks], bool)
            if matched.any():
                codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
                rows |= np.append(matched, False)[codes]
                hits.update(mark for mark in marks if mark in self.marks and mark is not None)
        return rows, sorted(hits)


def _texts(found: object) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise TypeError(f"'marks' is not a list of texts but {found!r:.40}")
    return found
