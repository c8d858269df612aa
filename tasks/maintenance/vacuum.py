"""Vacuum: remove the files that no kept release needs.

Kept are the release that is served, the last `keep` promoted ones, and whatever else is among the newest `keep`; never
one that holds a forgotten person. Of the anchor the models are kept. The others stay in the history with their metrics
and are marked as vacuumed before the first file is deleted: a run that is interrupted leaves only leftovers for the
next one. Logs of the tables are cut to the oldest version that a kept release names, and a few more.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from schemas.errors import FrontalisError, SettingsError
from schemas.releases import Release, anchor_of
from schemas.settings import KEEP_RELEASES, RetentionSettings
from storage.features import features_table, quarantine_table
from storage.leftovers import Leftover, find_leftovers
from storage.location import Location
from storage.lock import store_lock
from storage.releases import Releases
from storage.tombstones import Tombstones
from tasks.maintenance.erased_releases import mark_erased

log = logging.getLogger("frontalis.vacuum")

LOG_MARGIN = 10  # newest commits that stay anyway: a reader or a rollback, which have no lock, may be at one of them
# Object storage has no lock: a file this young may belong to a run that has not committed yet.
OBJECT_STORAGE_GRACE_HOURS = 24.0


class Vacuumed(BaseModel):
    """What was removed, or with `dry_run` would be. `waiting` counts files too young to be sure of."""

    dry_run: bool
    kept_releases: list[str]
    removed_releases: list[str]
    files: list[str]
    bytes: int
    waiting: int


def clean(
    store: str, *, keep: int = KEEP_RELEASES, dry_run: bool = False, grace_hours: float | None = None, wait: float = 0.0
) -> Vacuumed:
    """Remove what nothing needs.

    Args:
        store: local path or s3://…
        keep: how many promoted releases stay, at least 1.
        dry_run: return what would be removed, and remove nothing.
        grace_hours: leave files younger than this; by default 0 locally, where the lock shows that nothing runs, and 24
            on object storage.
        wait: seconds to wait for a run that holds the store.

    Raises:
        SettingsError: `keep` is below 1, or there is no store: in any other folder no file is a leftover.
        StoreBusyError: a run holds the store.
        StoreError: a kept release cannot be read; nothing is removed then.
    """
    if keep < 1:
        raise SettingsError(f"--keep {keep}: at least 1 release is kept.")
    history = Releases.of(Location(store))
    with store_lock(history.store, "vacuum", wait):
        return _clean(history, keep, dry_run, grace_hours)


def apply_retention(store: Location, retention: RetentionSettings) -> None:
    """Remove what nothing needs at the end of a run, which holds the lock. A failure is a warning: the run is done."""
    if not retention.keep:
        return
    try:
        done = _clean(Releases(store), retention.keep, False, retention.min_age_hours)
    except (FrontalisError, OSError) as error:
        log.warning("retention: not everything was removed (%s); run `frontalis vacuum --store %s`", error, store.uri)
        return
    if done.files:
        log.info("retention: %d files of %d bytes removed", len(done.files), done.bytes)


def _clean(history: Releases, keep: int, dry_run: bool, grace_hours: float | None) -> Vacuumed:
    place = history.store
    if grace_hours is None:
        grace_hours = 0.0 if place.is_local else OBJECT_STORAGE_GRACE_HOURS
    listed = history.all()
    releases = mark_erased(place, listed, Tombstones.proven(place, listed))
    kept = kept_releases(releases, keep)
    names = {release.release for release in kept}
    gone = [old for old in releases if old.release not in names and not old.vacuumed]
    anchor = anchor_of(releases)
    find_leftovers(place, kept, anchor)  # refuses before anything is marked
    after = [old if old.release in names else old.as_vacuumed() for old in releases]
    if after != listed and not dry_run:
        history.rewrite(after, listed)
    found = find_leftovers(place, kept, anchor)
    youngest = time.time_ns() - int(grace_hours * 3600e9)
    old_enough = [one for one in found if not grace_hours or one.mtime_ns < youngest]
    if not dry_run:
        _delete(place, old_enough)
        _trim_logs(history, kept)
    return Vacuumed(
        dry_run=dry_run,
        kept_releases=[release.release for release in kept],
        removed_releases=[release.release for release in gone],
        files=[one.name for one in old_enough],
        bytes=sum(one.size for one in old_enough),
        waiting=len(found) - len(old_enough),
    )


def kept_releases(releases: Sequence[Release], keep: int = KEEP_RELEASES) -> list[Release]:
    """Return the releases whose files stay, oldest first."""
    sound = [release for release in releases if not (release.erased or release.vacuumed)]
    promoted = [release for release in sound if release.gate.promoted][-keep:]
    names = {release.release for release in [*promoted, *sound[-keep:]]}
    return [release for release in sound if release.serving or release.release in names]


def _trim_logs(history: Releases, kept: Sequence[Release]) -> None:
    features, quarantine = features_table(history.store), quarantine_table(history.store)
    for table, versions in (
        (features, [release.features_version for release in kept]),
        (quarantine, [release.quarantine_version for release in kept if release.quarantine_version is not None]),
        (history.table, []),
    ):
        newest = table.snapshot().version
        table.log.trim(min([*versions, newest - LOG_MARGIN]), table.place.delta_options)


def _delete(store: Location, leftovers: Sequence[Leftover]) -> None:
    for number, one in enumerate(leftovers, 1):
        (store / one.name).delete()
        if number % 1000 == 0:
            log.info("vacuum: %d of %d files removed", number, len(leftovers))
    if store.is_local:
        for folder in {parent for one in leftovers for parent in Path(one.name).parents if parent.name}:
            _remove_if_empty(Path(store.path) / folder)


def _remove_if_empty(folder: Path) -> None:
    for step in (folder, *folder.parents):
        try:
            step.rmdir()
        except OSError:
            return
