"""Model selection: what the validation score rewards and punishes."""

import numpy as np
import pytest
import torch

from tasks.training.rows import TrainingRows
from tasks.training.selection import ValidationScorer, compare_by_pose, error_rates, validation_score


def compared(x):
    """All pairs of 30 subjects with four frontal and four profile rows each."""
    subjects, classes = np.repeat(np.arange(30), 8), np.tile([0, 0, 0, 0, 2, 2, 2, 2], 30)
    return compare_by_pose(x, subjects, classes)


def faces(profile_noise, frontal_noise=0.5):
    random = np.random.default_rng(3)
    centres, noise = np.repeat(random.normal(size=(30, 24)), 8, axis=0), random.normal(size=(240, 24))
    spread = np.tile([frontal_noise] * 4 + [profile_noise] * 4, 30)[:, None]
    return (centres + spread * noise).astype(np.float32)


def test_score_falls_with_better_profiles_and_rises_with_harm_to_frontal_pairs():
    raw = compared(faces(1.6, 0.8))
    assert validation_score(raw, raw) == 0
    better, harmed = compared(faces(1.2, 0.8)), compared(faces(1.6, 1.3))
    assert validation_score(better, raw) < -0.05
    assert validation_score(harmed, raw) > 0.05
    # A better frontal–frontal cell is no merit by itself: only its harm counts.
    frontal = {name: cell for name, cell in raw.cells.items() if name == "frontal-frontal"}
    swapped = {**better.cells, **frontal}
    expected = validation_score(type(better)(better.overall, swapped, better.clusters), raw)
    assert expected == pytest.approx(validation_score(better, raw), abs=1e-9)


def test_scorer_gives_raw_the_score_0_and_keeps_the_rates():
    classes = np.tile([0, 0, 0, 0, 2, 2, 2, 2], 30)
    names = np.array([f"s{number // 8}" for number in range(240)], dtype=object)
    scorer = ValidationScorer(TrainingRows(faces(1.6), names, classes, "", 0), mean_norm=5.0)
    score = scorer(torch.nn.Identity())
    assert score == pytest.approx(0, abs=1e-3)
    expected = error_rates(scorer.raw.cells["frontal-profile"])
    assert scorer.rates[score] == pytest.approx(expected, abs=1e-3)
