"""Training subjects of a release's models: of any of them, and which models do not record them."""

import numpy as np
import pytest

from models.checkpoint import load, save
from schemas.errors import StoreError
from schemas.releases import ModelRef
from storage.location import Location
from tasks.evaluation.leakage import training_subjects

NAMES = [f"person {number}" for number in range(200)]


def ref(path: str) -> ModelRef:
    return ModelRef(path=path, file_digest="", digest="", statistic="frozen", dim=64)


@pytest.fixture
def store(tmp_path, make_checkpoint) -> Location:
    make_checkpoint(tmp_path / "recorded.safetensors")
    checkpoint = load(tmp_path / "recorded.safetensors")
    save(checkpoint.card, checkpoint.model, tmp_path / "silent.safetensors")
    save(checkpoint.card, checkpoint.model, tmp_path / "nobody.safetensors", np.empty(0, np.int64))
    return Location(str(tmp_path))


def test_subjects_of_any_model_count(store, tmp_path) -> None:
    expected = load(tmp_path / "recorded.safetensors").has_seen(NAMES)
    seen, unknown = training_subjects(
        store, NAMES, {"per_sample": ref("nobody.safetensors"), "batch_stat": ref("recorded.safetensors")}
    )
    np.testing.assert_array_equal(seen, expected)
    assert unknown == {}


def test_a_model_without_recorded_subjects_is_named(store) -> None:
    seen, unknown = training_subjects(store, NAMES, {"per_sample": ref("silent.safetensors")})
    assert not seen.any()
    assert list(unknown) == ["per_sample"]
    assert "does not record its training subjects" in unknown["per_sample"]


def test_a_missing_model_is_an_error(store) -> None:
    with pytest.raises(StoreError, match=r"gone\.safetensors: the model is missing"):
        training_subjects(store, NAMES, {"per_sample": ref("gone.safetensors")})
