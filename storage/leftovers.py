"""What lies in a store although nothing needs it: files of old versions, of interrupted runs, and temporary ones.

A set difference again: what is on disk minus what the kept releases, the newest table versions and the census name.
Only the folders that this program writes are looked at. Deciding which releases are kept, and deleting, is left to
`flows.vacuum`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from schemas.releases import Release
from storage.census import CENSUS, Census
from storage.features import features_table, quarantine_table
from storage.location import TEMPORARY, Location
from storage.releases import RELEASES, Releases

# What a killed writer leaves: our own temporary files, and those of Delta's log.
_TEMPORARY = re.compile(rf"(^|/)({re.escape(TEMPORARY)}[^/]*|_commit_[^/]*\.tmp|[^/]*\.(json|parquet)#\d+)$")
_FOLDERS = ("features", "quarantine", RELEASES, "indexes", "reports", "models", CENSUS)


@dataclass(frozen=True)
class Leftover:
    """A file that nothing needs. `name` is relative to the store."""

    name: str
    size: int
    mtime_ns: int
    temporary: bool


def find_leftovers(store: Location, kept: Iterable[Release]) -> list[Leftover]:
    """List the files that neither the kept releases nor the newest state of the store need, sorted by name.

    Raises:
        StoreError: a kept release cannot be read; nothing can be told then.
    """
    needed, folders = _needed(store, list(kept))
    found = []
    for entry in store.files(hidden=True):
        temporary = bool(_TEMPORARY.search(entry.name))
        if not temporary:
            top, _, rest = entry.name.partition("/")
            known = top in _FOLDERS and rest and not rest.startswith("_delta_log/")
            if not known or entry.name in needed or entry.name.startswith(folders):
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
    needed |= {f"{CENSUS}/{name}" for name in Census(store / CENSUS).load().names()}
    folders = tuple(f"{release.report.rsplit('/', 1)[0]}/" for release in kept if release.report)
    return needed, folders
