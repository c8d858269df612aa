"""What lies in a store although nothing needs it: files of old versions, of interrupted runs, and temporary ones.

A set difference again: what is on disk minus what the kept releases, the newest table versions and the manifest name.
Only names that this program gives, where it gives them, are looked at: a file of somebody else's is never a leftover,
whatever folder it lies in. Deciding which releases are kept, and deleting, is left to `tasks.maintenance.vacuum`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from schemas.releases import Release
from storage.features import FEATURES, QUARANTINE, features_table, quarantine_table
from storage.location import TEMPORARY, Location
from storage.manifest import MANIFEST, RECORDS, Manifest
from storage.releases import RELEASES, Releases

_HEX, _RELEASE = "[0-9a-f]+", "r[0-9]{5,}-[0-9a-f]+"
_TABLES = rf"{FEATURES}|{QUARANTINE}|{RELEASES}"
_OURS = re.compile(
    rf"{FEATURES}/mode=[^/]+/shard=[^/]+/{_HEX}-{_HEX}\.parquet"
    rf"|{QUARANTINE}/shard=[^/]+/{_HEX}-{_HEX}\.parquet"
    rf"|{RELEASES}/(?P<version>[0-9]{{8}}-)?{_HEX}\.parquet"
    rf"|indexes/{_RELEASE}/[^/]+/(index\.faiss|ids\.parquet)"
    rf"|reports/{_RELEASE}/(index\.html|metrics\.json|plots/[^/]+\.(svg|png))"
    rf"|models/{_HEX}\.safetensors"
    rf"|{MANIFEST}/({re.escape(RECORDS)}|keys/{_HEX}-{_HEX}\.parquet)"
)
# What a killed writer leaves: our own temporary files, and those of Delta's log.
_TEMPORARY = re.compile(
    rf"(({_TABLES}|indexes|reports|models|{MANIFEST})/(.*/)?)?{re.escape(TEMPORARY)}[0-9a-f]{{16}}"
    rf"|({_TABLES})/_delta_log/(_commit_[^/]*\.tmp|[^/]*\.(json|parquet)#\d+)"
)


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
    history = Releases(store).table.snapshot().version
    needed, folders = _needed(store, list(kept))
    found = []
    for entry in store.files(hidden=True):
        temporary = bool(_TEMPORARY.fullmatch(entry.name))
        if not temporary:
            ours = _OURS.fullmatch(entry.name)
            if not ours or entry.name in needed or entry.name.startswith(folders):
                continue
            # A rollback holds no lock: what it is about to commit carries the number of a version to come.
            if ours["version"] and int(ours["version"][:-1]) > history:
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
    needed |= {f"{MANIFEST}/{name}" for name in Manifest(store / MANIFEST).load().names()}
    folders = tuple(f"{release.report.rsplit('/', 1)[0]}/" for release in kept if release.report)
    return needed, folders
