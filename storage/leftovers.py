"""Unreferenced files of a store: those of old versions, of interrupted runs, and temporary ones.

A set difference: the files on disk minus those that the kept releases, the newest table versions and the manifest
reference. Only names of `storage.layout` count: a file of another program is never a leftover. No link below the store
is followed: it may lead into another store. Deciding which releases are kept, and deleting, is left to
`tasks.maintenance.vacuum`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from schemas.releases import Release
from storage import layout
from storage.features import features_table, quarantine_table
from storage.location import Location
from storage.manifest import Manifest
from storage.releases import Releases


@dataclass(frozen=True)
class Leftover:
    """An unreferenced file. `name` is relative to the store."""

    name: str
    size: int
    mtime_ns: int
    temporary: bool


def find_leftovers(store: Location, kept: Iterable[Release], anchor: Release | None = None) -> list[Leftover]:
    """List the files that neither the kept releases nor the newest state of the store reference, sorted by name.

    Of the anchor the models are needed, kept or not: later releases are compared with what they make of the same rows.

    Raises:
        StoreError: a kept release cannot be read, so what it references is unknown.
    """
    history = Releases(store).table.snapshot().version
    needed, folders = _needed(store, list(kept))
    needed |= {model.path for model in anchor.models.values()} if anchor is not None else set()
    found = []
    for entry in store.files(hidden=True, links=False):
        temporary = layout.is_temporary(entry.name)
        if not temporary:
            if not layout.is_own(entry.name) or entry.name in needed or entry.name.startswith(folders):
                continue
            # A rollback takes no lock: the file that it is about to commit carries the number of a version to come.
            if (layout.history_version(entry.name) or 0) > history:
                continue
        found.append(Leftover(entry.name, entry.size, entry.mtime_ns, temporary))
    return found


def _needed(store: Location, kept: list[Release]) -> tuple[set[str], tuple[str, ...]]:
    features, quarantine = features_table(store), quarantine_table(store)
    needed: set[str] = set()
    for table, versions in (
        (features, {release.features_version for release in kept}),
        (quarantine, {release.quarantine_version for release in kept if release.quarantine_version is not None}),
        (Releases(store).table, set[int]()),
    ):
        for version in (None, *sorted(versions)):
            needed |= {f"{table.place.name}/{path}" for path in table.snapshot(version).files}
    needed |= {model.path for release in kept for model in release.models.values()}
    needed |= {path for release in kept for index in release.indexes.values() for path in (index.path, index.ids_path)}
    needed |= set(Manifest(store).load().paths())
    folders = tuple(f"{PurePosixPath(release.report).parent}/" for release in kept if release.report)
    return needed, folders
