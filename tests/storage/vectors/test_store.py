"""Opening by the record: what is missing, damaged or longer than recorded is refused with the way out."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from schemas.errors import StoreError
from schemas.index import IndexSettings
from schemas.releases import IndexRef
from storage.location import Location
from storage.parquet import to_parquet
from storage.vectors.index import build
from storage.vectors.store import ids_digest, open_ids, open_index

KEYS = np.arange(20)
VECTORS = np.random.default_rng(5).standard_normal((20, 8)).astype(np.float32)
IDS = pa.table({"key": KEYS, "id": [f"i{key}" for key in KEYS]})


@pytest.fixture
def store(tmp_path: Path) -> Location:
    return Location(str(tmp_path))


@pytest.fixture
def reference(store: Location) -> IndexRef:
    with (store / "index.faiss").writing() as file:
        written = build(lambda: [(KEYS, VECTORS)], 20, 8, IndexSettings()).write(file)
    content = to_parquet(IDS)
    (store / "ids.parquet").write_bytes(content)
    return IndexRef(
        path="index.faiss",
        digest=written.digest,
        size=written.size,
        ids_path="ids.parquet",
        ids_digest=ids_digest(content),
        rows=20,
        dim=8,
        factory="Flat",
    )


def test_both_are_opened_as_they_were_written(store: Location, reference: IndexRef) -> None:
    assert open_index(store, reference).keys().tolist() == KEYS.tolist()
    assert open_ids(store, reference).equals(IDS)


@pytest.mark.parametrize(("name", "read"), [("index.faiss", open_index), ("ids.parquet", open_ids)])
def test_a_missing_or_changed_file_is_refused(store: Location, reference: IndexRef, name: str, read) -> None:
    content = bytearray((store / name).read_bytes())
    content[len(content) // 2] ^= 1
    (store / name).write_bytes(bytes(content))
    with pytest.raises(StoreError, match=rf"{name}: .*digest"):
        read(store, reference)
    (store / name).delete()
    with pytest.raises(StoreError, match=rf"{name}: is missing; run `frontalis verify --store {store.uri}`"):
        read(store, reference)


def test_an_index_longer_than_recorded_is_refused(store: Location, reference: IndexRef) -> None:
    with pytest.raises(StoreError, match="longer than the 10 bytes"):
        open_index(store, reference.model_copy(update={"size": 10}))
