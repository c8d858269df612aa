"""Entries of the list of tombstones: who was forgotten, as a hash, and what was lifted again."""

from typing import Literal

from pydantic import Field

from schemas.reports import Record

TombstoneKind = Literal["id", "subject", "subject_ignore_case"]


class Tombstone(Record):
    """One entry of the list, which only ever grows: a tombstone, or with `undone` the end of an earlier one."""

    mark: str = Field(description="salted hash of the id or name")
    kind: TombstoneKind | None = Field(default=None, description="None in lists of earlier builds")
    time: str | None = Field(default=None, description="ISO 8601, UTC")
    rows: int | None = Field(default=None, description="that it matched when it was added, quarantined ones included")
    undone: bool = False
