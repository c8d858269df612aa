"""Find releases that hold somebody who was forgotten since, and mark them: they are neither served nor kept.

`frontalis forget` marks them itself. Where it was interrupted between its tombstone and its commit, the next run,
vacuum or rollback sees by `Release.tombstones` that the list has grown, and checks. Deleting rows is left to
`tasks.maintenance.erase`.
"""

import logging
from collections.abc import Iterable

from schemas.errors import StoreError
from schemas.metrics import RAW
from schemas.releases import Release
from storage.features import quarantine_table
from storage.location import Location
from storage.releases import Releases
from storage.tables import NO_TABLE
from storage.tombstones import Tombstones
from storage.vectors.store import open_ids
from tasks.maintenance.forgotten_rows import find_forgotten

log = logging.getLogger("frontalis.forgotten")


def mark_erased_releases(history: Releases, tombstones: Tombstones) -> list[Release]:
    """Mark what holds a forgotten row, in one commit or none, and return the history as it is then.

    Raises:
        StoreBusyError: another run changed the history meanwhile.
    """
    releases = history.all()
    marked = mark_erased(history.store, releases, tombstones)
    if marked != releases:
        history.rewrite(marked, releases)
    return marked


def mark_erased(store: Location, releases: Iterable[Release], tombstones: Tombstones) -> list[Release]:
    """Return the history with every release that holds a forgotten row marked as erased, but the one that is served.

    That one answers queries until a release without the rows replaces it. A release that was made or checked with this
    list is not opened.
    """
    marked = []
    for old in releases:
        if not (old.erased or old.vacuumed) and old.tombstones != tombstones.digest:
            if not holds_forgotten(store, old, tombstones):
                old = old.as_matched_with(tombstones.digest, len(tombstones.entries))
            elif old.serving:
                log.warning(
                    "%s is served and holds rows of somebody who was forgotten, since `frontalis forget` was "
                    "interrupted; run it once more",
                    old.release,
                )
            else:
                old = old.as_erased()
        marked.append(old)
    return marked


def holds_forgotten(store: Location, release: Release, tombstones: Tombstones) -> bool:
    """Return whether a release holds a forgotten row; one that cannot be read counts as if it did."""
    try:
        if RAW in release.indexes:
            ids = open_ids(store, release.indexes[RAW])
            gone, _ = tombstones.match(ids["id"].combine_chunks(), ids["subject"].combine_chunks())
            if gone.any():
                return True
        if release.quarantine_version is None:
            return False
        quarantine = quarantine_table(store).snapshot(release.quarantine_version)
        return bool(find_forgotten(store, NO_TABLE, quarantine, tombstones))
    except StoreError:
        return True
