"""Roll back: serve an older release at once."""

from schemas.errors import SettingsError, StoreError
from schemas.releases import Release
from storage.features import features_table
from storage.location import Location
from storage.releases import Releases
from storage.tombstones import Tombstones
from storage.vectors.store import open_ids, open_index
from tasks.checkpoints import stored_checkpoint
from tasks.maintenance.erased_releases import holds_forgotten


def roll_back(store: str, release: str) -> Release:
    """Serve `release` from now on; features, indexes and models of a release always go together.

    It takes no lock, so that it never waits for a run: the pointer moves in one commit. A run, forget or vacuum that is
    at work then finds the history changed, and is refused when it wants to change it itself.

    Raises:
        SettingsError: there is no such store or release, its files were vacuumed, or it holds a forgotten person.
        StoreBusyError: another commit came at the same moment; what is served is what that one says.
        StoreError: what the release needs is gone or damaged; what is served stays.
    """
    history = Releases.of(Location(store))
    place, wanted = history.store, history.servable(release)
    tombstones = Tombstones.proven(place, history.all())
    check_complete(place, wanted)
    if wanted.tombstones != tombstones.digest and holds_forgotten(place, wanted, tombstones):
        raise SettingsError(f"release {release} holds a person who was forgotten since; choose a later one.")
    return history.serve(release)


def check_complete(store: Location, release: Release) -> None:
    """Open all that a release needs to answer queries.

    Raises:
        StoreError: a part is missing or damaged.
    """
    table = features_table(store)
    files = table.snapshot(release.features_version).files
    on_disk = {entry.name: entry.size for entry in table.place.files(".parquet")}
    for path, file in files.items():
        if on_disk.get(path) != file.size:
            raise StoreError(f"{table.place.uri}/{path}: is missing or truncated, so {release.release} is not served.")
    for index in release.indexes.values():
        open_index(store, index)
        open_ids(store, index)
    for model in release.models.values():
        stored_checkpoint(store, model)
