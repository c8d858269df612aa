"""A stored checkpoint is read once, and again when its file was replaced."""

import pytest

from schemas.errors import BadModelError, StoreError
from schemas.releases import ModelRef
from storage.location import Location
from tasks.checkpoints import stored_checkpoint


def test_a_checkpoint_is_read_once_and_a_replaced_one_again(tmp_path, make_checkpoint) -> None:
    store = Location(str(tmp_path))
    model = ModelRef(path="models/a.safetensors", file_digest="a", digest="a", statistic="frozen", dim=32)
    with pytest.raises(StoreError, match="the model is missing"):
        stored_checkpoint(store, model)
    file = tmp_path / model.path
    file.parent.mkdir()
    make_checkpoint(file)
    first = stored_checkpoint(store, model)
    assert stored_checkpoint(Location(str(tmp_path)), model) is first
    make_checkpoint(file, seed=1)
    assert stored_checkpoint(store, model).file_digest != first.file_digest
    file.write_bytes(b"no checkpoint")
    with pytest.raises(BadModelError):
        stored_checkpoint(store, model)
