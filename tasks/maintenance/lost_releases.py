"""Find releases whose version of a table is lost, as after a power cut on a disk that does not keep what it confirmed.

The next commit takes the number of a lost version. A release that names this number would then show other rows, so it
is marked as vacuumed first. It stays only where the run is about to publish the same content under the same number.
"""

import logging
from collections.abc import Collection, Sequence

from schemas.errors import StoreError
from schemas.releases import Release
from storage.features import features_table, quarantine_table
from storage.location import Location
from storage.releases import Releases

log = logging.getLogger("frontalis.lost")


def is_published(store: Location, release: Release, wanted: Collection[str]) -> bool:
    """Return whether the tables have, at the versions of a release, the wanted files and all quarantined rows."""
    try:
        features = features_table(store).snapshot(release.features_version)
        rows = 0
        if release.quarantine_version is not None:
            quarantine = quarantine_table(store).snapshot(release.quarantine_version)
            rows = sum(file.rows for file in quarantine.files.values())
    except StoreError:
        return False
    return set(features.files) == set(wanted) and rows == sum(release.data.quarantined.values())


def mark_lost_releases(history: Releases, releases: Sequence[Release], content: str) -> list[Release]:
    """Mark releases of lost versions, in one commit or none, and return the history as it is then.

    Args:
        history: that of the store, which the caller has locked.
        releases: the history as it is.
        content: that of the release which the run is about to publish (`tasks.release.release_content`).

    Raises:
        StoreBusyError: another run changed the history meanwhile.
    """
    features = features_table(history.store).snapshot().version
    quarantine = quarantine_table(history.store).snapshot().version
    marked = []
    for old in releases:
        beyond = old.features_version - features
        if old.quarantine_version is not None:
            beyond = max(beyond, old.quarantine_version - quarantine)
        if not old.unusable and beyond > 0 and not (beyond == 1 and old.content == content):
            log.warning("%s: its version of the tables is lost, so it can no longer be served", old.release)
            old = old.as_vacuumed().as_retired()
        marked.append(old)
    if marked != list(releases):
        history.rewrite(marked, releases)
    return marked
