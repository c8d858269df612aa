"""The Markdown beside a checkpoint says what the card says."""

from schemas.models import ModelCard
from schemas.reports import Estimate
from tasks.training.model_card import card_markdown, change_interval


def test_card_shows_rates_beside_raw_and_their_difference():
    card = ModelCard(
        architecture="dual_branch_ensemble",
        arguments={"feature_dim": 8},
        mode="per_sample",
        embedding_dim=8,
        normalisation="mean_norm",
        mean_norm=3.5,
        training_data="abc123",
        versions={"torch": "2.13"},
        metrics={
            "alpha": [0.7, 0.65],
            "steps": 240,
            "chosen_on": "validation",
            "change_scaled_by": 0.8,
            "measured_on": "test",
            "rates": {
                "raw": {"all": {"eer": 0.1, "fnmr@1e-2": 0.25, "fnmr@1e-3": None}},
                "per_sample": {"all": {"eer": 0.08, "fnmr@1e-2": 0.2, "fnmr@1e-3": None}},
            },
            "difference": {"all": {"eer": {"value": -0.02, "low": -0.03, "high": -0.01}}},
        },
    )
    text = card_markdown(card)
    assert "| all | raw | 10.00 | 25.00 | n/e | n/e |" in text
    assert "| all | per_sample | 8.00 | 20.00 | n/e | n/e |" in text
    assert "| all | -2.00 [-3.00, -1.00] |" in text
    for piece in (
        "steps: 240",
        "scaled by 0.8, chosen by validation",
        "0.700, 0.650",
        "mean_norm 3.5",
        "abc123",
        "test subjects",
        "torch 2.13",
    ):
        assert piece in text


def test_card_without_metrics_is_still_a_card():
    text = card_markdown(ModelCard(architecture="se", arguments={}, mode="per_sample", embedding_dim=8))
    assert text.startswith("# se, per_sample, D = 8")


def test_interval_in_words():
    assert change_interval(Estimate(value=-0.012, low=-0.02, high=0.004)) == "-1.20 [-2.00, +0.40]"
    assert change_interval(Estimate(value=0.01)) == "+1.00"
    assert change_interval(Estimate(value=None)) == change_interval(None) == "n/e"
