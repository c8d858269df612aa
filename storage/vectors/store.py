"""The index and the id map of a release, opened by what its record says of them.

The id map is `ids.parquet` (key, id, subject, shard; ordered by key). It turns the 64-bit keys of FAISS back into ids.
Making both is left to `tasks.index`.
"""

import hashlib

import pyarrow as pa

from schemas.errors import StoreError
from schemas.features import DIGEST_BYTES
from schemas.releases import IndexRef
from storage.location import Location
from storage.parquet import from_parquet
from storage.vectors.index import VectorIndex, read_index

IDS_LIMIT = 1 << 36


def open_index(store: Location, reference: IndexRef) -> VectorIndex:
    """Open the index of a release, after checking the digest of its bytes.

    Raises:
        StoreError: it is missing, damaged, or larger than recorded.
    """
    place = store / reference.path
    try:
        with place.open_input() as file:
            return read_index(file, reference.digest, reference.size, place.uri)
    except FileNotFoundError as error:
        raise _missing(store, place) from error


def open_ids(store: Location, reference: IndexRef) -> pa.Table:
    """Open the id map of a release, after checking its digest.

    Raises:
        StoreError: it is missing or damaged.
    """
    place = store / reference.ids_path
    try:
        content = place.read_bytes(IDS_LIMIT)
    except FileNotFoundError as error:
        raise _missing(store, place) from error
    if ids_digest(content) != reference.ids_digest:
        raise StoreError(f"{place.uri}: is damaged (its digest differs); run `frontalis verify --store {store.uri}`.")
    return from_parquet(content)


def ids_digest(content: bytes) -> str:
    """Return the digest that a release records of its id map."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()


def _missing(store: Location, place: Location) -> StoreError:
    return StoreError(f"{place.uri}: is missing; run `frontalis verify --store {store.uri}`.")
