import pytest
from pydantic import ValidationError

from schemas.models import DualBranchArguments, DualBranchEnsembleArguments, ModelCard, SEArguments
from schemas.split import SplitRule


def card(**changes: object) -> ModelCard:
    fields = {"architecture": "se", "arguments": {"channels": 64}, "mode": "per_sample", "embedding_dim": 64}
    return ModelCard(**{**fields, **changes})


def test_card_survives_json_with_nothing_lost():
    full = card(
        normalisation="none",
        training_data="ab",
        split=SplitRule(salt="x", train=0.5, validation=0.25, test=0.25),
        metrics={"eer": 0.125, "steps": 160, "nested": [{"a": None}, True]},
        versions={"torch": "2.13.0"},
        created="2026-01-01",
    )
    assert ModelCard.model_validate_json(full.model_dump_json()) == full


def test_mean_norm_and_its_normalisation_go_together():
    assert card(normalisation="mean_norm", mean_norm=3.5).mean_norm == 3.5
    with pytest.raises(ValidationError, match="one needs the other"):
        card(normalisation="mean_norm")
    with pytest.raises(ValidationError, match="one needs the other"):
        card(normalisation="l2", mean_norm=1.0)


def test_dimension_is_read_from_either_network():
    assert SEArguments(channels=48).dim == DualBranchArguments(feature_dim=48).dim == 48
    assert DualBranchEnsembleArguments(feature_dim=48).dim == 48
