"""Targets of erasure: whom a person or a file names, checked against the type of the store's ids."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import pyarrow as pa

from schemas.errors import SettingsError
from schemas.identity import parse_id, parse_text
from schemas.tombstones import TombstoneKind
from storage.features import features_table
from storage.location import Location


@dataclass(frozen=True)
class Target:
    """Whom to forget: all rows of a subject, or the one row of an id (an integer id as its digits).

    `where` is what messages call it: they never contain a name.
    """

    kind: Literal["id", "subject"]
    value: str
    ignore_case: bool = False
    where: str = field(default="", compare=False)

    @property
    def tombstone(self) -> TombstoneKind:
        """The kind of its tombstone."""
        return "subject_ignore_case" if self.ignore_case else self.kind


def read_targets(file: str, *, ignore_case: bool = False) -> list[Target]:
    """Read whom to forget from JSON lines, each `{"subject": "NAME"}` or `{"id": "ID"}`. Blank lines are skipped.

    Args:
        file: local path or s3://…
        ignore_case: whether subjects are compared without case.

    Raises:
        SettingsError: there is no such file, or a line has another form. The message names the line, never a person.
    """
    try:
        lines = Location(file).read_bytes().decode().splitlines()
    except FileNotFoundError as error:
        raise SettingsError(f"{file}: there is no such file.") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: is no UTF-8.") from error
    targets = [_target(file, number, line, ignore_case) for number, line in enumerate(lines, 1) if line.strip()]
    if not targets:
        raise SettingsError(f'{file}: lists nobody; write lines such as {{"subject": "NAME"}}.')
    return targets


def _target(file: str, number: int, line: str, ignore_case: bool) -> Target:
    where = f"{file}, line {number}"
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and len(found) == 1:
        if isinstance(found.get("subject"), str) and found["subject"].strip():
            return Target("subject", found["subject"], ignore_case, where)
        value = found.get("id")
        if (isinstance(value, str) and value.strip()) or type(value) is int:
            return Target("id", str(value), where=where)
    raise SettingsError(f'{where}: write {{"subject": "NAME"}} or {{"id": "ID"}}.')


def checked_targets(store: Location, targets: Sequence[Target]) -> list[Target]:
    """Return the targets with ids and names in the form in which they are compared.

    Raises:
        SettingsError: a name is empty, or the store has integer ids and an id is not one.
    """
    schema = features_table(store).schema()
    integer = schema is not None and pa.types.is_integer(schema.field("id").type)
    checked = []
    for target in targets:
        shown = target.where or f"forget --{target.kind}"
        value = (
            parse_id(target.value, integer=integer, shown=shown)
            if target.kind == "id"
            else parse_text(target.value, shown)
        )
        checked.append(replace(target, value=str(value), where=shown))
    return checked
