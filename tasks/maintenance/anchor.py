"""Move the anchor: the release whose models no later release may be inferior to."""

from schemas.releases import Release
from storage.location import Location
from storage.releases import Releases
from tasks.checkpoints import stored_checkpoint


def move_anchor(store: str, release: str) -> Release:
    """Make a release the anchor. Its models are needed, not its features: it may have been vacuumed or erased.

    It takes no lock, like a rollback: one commit moves it, and a run at work then finds the history changed.

    Raises:
        SettingsError: there is no such store or release, or it was rejected.
        StoreBusyError: another commit came at the same moment; the anchor is what that one says.
        StoreError: a model of the release is gone or damaged; the anchor stays.
    """
    history = Releases.of(Location(store))
    for wanted in history.all():
        if wanted.release == release:
            for model in wanted.models.values():
                stored_checkpoint(history.store, model)
    return history.anchor(release)
