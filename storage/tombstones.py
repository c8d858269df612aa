"""Tombstones: salted hashes of forgotten ids and subjects, which keep their rows out while the source still has them.

The list contains no names: a tombstone is a keyed BLAKE2b hash under a random salt that never leaves the store. The
list only grows; lifting a tombstone appends an entry. So its length and digest at any time prove what it must begin
with. Releases and the log of erasures record both, and a list that is missing, older or of another store is refused.
Taking the rows out of the tables and indexes is left to `tasks.maintenance.forget`.
"""

import copy
import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from schemas.errors import StoreError, first_line
from schemas.features import DIGEST_BYTES
from schemas.identity import folded_text, normal_text
from schemas.releases import Release
from schemas.tombstones import Tombstone, TombstoneKind
from storage.layout import FORGET_LOG, TOMBSTONES
from storage.location import Location

NEW_LIST = "new_list"
_ENTRIES = TypeAdapter(list[Tombstone])
_LINES = TypeAdapter(list[dict[str, Any]])


class TombstonesLostError(StoreError):
    """The list of tombstones is damaged, or lacks entries that a release or the log proves."""

    def __init__(self, place: Location, what: str) -> None:
        self.what = what
        super().__init__(
            f"{place.uri}: {what}. Forgotten people could come back, so nothing was done; restore the newest copy of "
            "this file from a backup first (docs/operations.md, Restore the list of tombstones)."
        )


@dataclass
class Found:
    """What one tombstone matches: how many rows, and the values (ids or names) in them."""

    rows: int = 0
    values: set[str] = field(default_factory=set)


class Tombstones:
    """The tombstones of a store, loaded from `tombstones.json`; empty where there are none."""

    def __init__(self, store: Location, *, load: bool = True) -> None:
        self.place = store / TOMBSTONES
        self.salt = secrets.token_hex(16)
        self._set(())
        if load:
            self._load()

    def _load(self) -> None:
        try:
            content = json.loads(self.place.read_bytes())
            self.salt = bytes.fromhex(content["salt"]).hex()
            if "entries" in content:
                self._set(_ENTRIES.validate_python(content["entries"]))
            else:  # lists of earlier builds
                self._set(Tombstone(mark=mark) for mark in _texts(content["marks"]))
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            # Without the list the next run would publish forgotten people again.
            raise TombstonesLostError(self.place, f"is damaged ({first_line(error)})") from error

    @classmethod
    def proven(cls, store: Location, releases: Iterable[Release]) -> "Tombstones":
        """Return the list of a store, checked against its releases and its log of erasures.

        Every command that serves or writes loads the list so. Read the releases first: the list is never behind them.

        Raises:
            TombstonesLostError: the list is missing, damaged, older or shorter than they prove.
        """
        proofs = {
            (old.tombstone_count, old.tombstones): f"release {old.release}"
            for old in releases
            if not old.unusable and old.tombstones != "none"
        }
        for number, line in enumerate(read_log(store), 1):
            if line.get("action") == NEW_LIST:
                proofs = {proof: by for proof, by in proofs.items() if by.startswith("release")}
            proofs[line.get("tombstones"), str(line.get("digest"))] = f"{FORGET_LOG}, line {number},"
        tombstones = cls(store)
        tombstones._check(proofs)
        return tombstones

    def _check(self, proofs: Mapping[tuple[int | None, str], str]) -> None:
        digests = self.digests()
        for (count, digest), by in sorted(proofs.items(), key=lambda proof: -(proof[0][0] or 0)):
            if not self.entries:
                raise TombstonesLostError(self.place, f"is missing or empty, but {by} proves that it had entries")
            # Earlier builds recorded no count: then only an empty list is known to be wrong.
            if count is not None and count > len(self.entries):
                raise TombstonesLostError(self.place, f"has {len(self.entries)} entries, but {by} proves {count}")
            if count is not None and digests[count] != digest:
                raise TombstonesLostError(self.place, f"does not begin with the {count} entries that {by} proves")

    def __bool__(self) -> bool:
        return bool(self.marks)

    @property
    def digest(self) -> str:
        """A digest of the whole list; part of what a shard's manifest depends on."""
        return self.digests()[-1]

    def digests(self) -> list[str]:
        """Return the digest of the list at each length from 0 to now."""
        state = hashlib.blake2b(digest_size=DIGEST_BYTES)
        found = ["none"]
        for entry in self.entries:
            part = (f"undone {entry.mark}" if entry.undone else entry.mark).encode()
            state.update(len(part).to_bytes(8, "little") + part)
            found.append(state.copy().hexdigest()[:12])
        return found

    @property
    def active(self) -> list[Tombstone]:
        """The tombstones in force, in the order in which they were added."""
        found: dict[str, Tombstone] = {}
        for entry in self.entries:
            if entry.undone:
                found.pop(entry.mark, None)
            else:
                found[entry.mark] = entry
        return list(found.values())

    def mark(self, kind: TombstoneKind, value: str) -> str:
        """Return the hash of an id or a name, as it is: see `tombstone` for typed ones."""
        key = bytes.fromhex(self.salt)
        return hashlib.blake2b(f"{kind}\0{value}".encode(), key=key, digest_size=16).hexdigest()

    def tombstone(self, kind: TombstoneKind, value: str, rows: int | None = None) -> Tombstone:
        """Return a new tombstone of an id (an integer as its digits) or a name."""
        form = folded_text(value) if kind == "subject_ignore_case" else normal_text(value)
        return Tombstone(mark=self.mark(kind, form), kind=kind, time=_now(), rows=rows)

    def add(self, entries: Iterable[Tombstone]) -> None:
        """Add tombstones that are not in force yet, and write the list atomically."""
        new = {entry.mark: entry for entry in entries if entry.mark not in self.marks}
        self._write(new.values())

    def undo(self, mark: str) -> None:
        """Lift a tombstone, and write the list atomically."""
        self._write([Tombstone(mark=mark, time=_now(), undone=True)])

    def only(self, entries: Iterable[Tombstone]) -> "Tombstones":
        """Return a list of some tombstones under the same salt, to match rows with; it is never written."""
        found = copy.copy(self)
        found._set(entries)
        return found

    def has_lost(self, earlier: "Tombstones") -> bool:
        """Return whether this list does not begin with an earlier one."""
        return self.salt != earlier.salt or self.entries[: len(earlier.entries)] != earlier.entries

    def match(self, ids: pa.Array, subjects: pa.Array | None) -> tuple[np.ndarray, list[str]]:
        """Return which rows are forgotten (bool `[n]`) and which tombstones matched.

        Args:
            ids: string or int64 ids, nulls allowed.
            subjects: subjects of the same rows, or None where the shard has none.
        """
        rows = np.zeros(len(ids), bool)
        hits: set[str] = set()
        for encoded, marks in self._matched(ids, subjects):
            matched = np.array([bool(found) for found in marks], bool)
            if matched.any():
                codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
                rows |= np.append(matched, False)[codes]
                hits.update(*marks)
        return rows, sorted(hits)

    def find(self, ids: pa.Array, subjects: pa.Array | None) -> dict[str, Found]:
        """Return what each tombstone matches; takes what `match` takes."""
        found: dict[str, Found] = {}
        for encoded, marks in self._matched(ids, subjects):
            codes = encoded.indices.drop_null().to_numpy(zero_copy_only=False)
            rows = np.bincount(codes, minlength=len(marks))
            for at, some in enumerate(marks):
                for mark in some:
                    one = found.setdefault(mark, Found())
                    one.rows += int(rows[at])
                    one.values.add(encoded.dictionary[at].as_py())
        return found

    def _matched(self, ids: pa.Array, subjects: pa.Array | None) -> Iterator[tuple[pa.DictionaryArray, list[set[str]]]]:
        """Yield each column, encoded, with the tombstones that match each of its values."""
        kinds: tuple[tuple[TombstoneKind, pa.Array | None], ...] = (
            ("id", ids.cast(pa.string())),
            ("subject", subjects),
        )
        for kind, column in kinds:
            if column is not None:
                encoded = column.dictionary_encode()
                yield encoded, [self._hits(kind, value) for value in encoded.dictionary.to_pylist()]

    def _hits(self, kind: TombstoneKind, value: str | None) -> set[str]:
        if value is None:
            return set()
        # As it is, too: lists of earlier builds hash what was typed.
        hits = {self.mark(kind, form) for form in {value, normal_text(value)}}
        if kind == "subject" and self.folds:
            hits.add(self.mark("subject_ignore_case", folded_text(value)))
        return hits & self.marks

    def _set(self, entries: Iterable[Tombstone]) -> None:
        self.entries = tuple(entries)
        active = self.active
        self.marks = frozenset(entry.mark for entry in active)
        self.folds = any(entry.kind == "subject_ignore_case" for entry in active)

    def _write(self, more: Iterable[Tombstone]) -> None:
        entries = (*self.entries, *more)
        stored = [entry.model_dump(exclude_defaults=True) for entry in entries]
        self.place.write_bytes(json.dumps({"salt": self.salt, "entries": stored}, indent=1).encode())
        self._set(entries)


def read_log(store: Location) -> list[dict[str, Any]]:
    """Return the log of erasures, oldest first.

    Raises:
        StoreError: it is damaged.
    """
    place = store / FORGET_LOG
    try:
        return _LINES.validate_python([json.loads(line) for line in place.read_bytes().splitlines()])
    except FileNotFoundError:
        return []
    except ValueError as error:
        why = first_line(error)
        raise StoreError(f"{place.uri}: is damaged ({why}); restore it from a backup first.") from error


def write_log(store: Location, tombstones: Tombstones, action: str, **counts: Any) -> None:
    """Add a line to the log of erasures: when, what and how many, never whom; with what proves the list by then."""
    line = {
        "time": _now(),
        "action": action,
        **counts,
        "tombstones": len(tombstones.entries),
        "digest": tombstones.digest,
    }
    lines = [*read_log(store), line]  # object storage has no append
    (store / FORGET_LOG).write_bytes(b"".join(json.dumps(one).encode() + b"\n" for one in lines))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _texts(found: object) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise TypeError(f"'marks' is not a list of texts but {found!r:.40}")
    return found
