"""Checkpoints of a store: each is read, checked and hashed once a process, whichever stages use it."""

import functools

from models.checkpoint import Checkpoint, load
from schemas.errors import StoreError
from schemas.releases import ModelRef
from storage.location import FileEntry, Location


def stored_checkpoint(store: Location, model: ModelRef) -> Checkpoint:
    """Return the checkpoint of a release. Several callers share it: do not change it.

    Raises:
        StoreError: the file is missing.
        BadModelError: the file is damaged.
    """
    place = store / model.path
    entry = place.entry()
    if entry is None:
        raise StoreError(f"{place.uri}: the model is missing; restore it from a backup, or run `frontalis reprocess`.")
    return _load(place.uri, entry)


@functools.lru_cache(maxsize=8)
def _load(uri: str, _entry: FileEntry) -> Checkpoint:
    """Read a checkpoint again only where its size, time or version has changed."""
    return load(Location(uri).read_bytes())
