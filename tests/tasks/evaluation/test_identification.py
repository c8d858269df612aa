"""Identification of one mode: gallery, mated and non-mated probes, the index beside exact search."""

import numpy as np
import pytest

from metrics.identification import exact_search
from schemas.index import IndexSettings
from schemas.metrics import POSE_CLASSES
from schemas.settings import EvaluationSettings
from tasks.evaluation import identification
from tasks.evaluation.identification import identify_mode

FRONTAL, PROFILE, UNKNOWN = (POSE_CLASSES.index(name) for name in ("frontal", "profile", "unknown"))
SETTINGS = EvaluationSettings()


def people(subjects: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return features, subjects, classes, duplicates: three frontal and two profile rows a subject, no copies."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((subjects, 16))
    codes = np.repeat(np.arange(subjects), 5)
    features = (centres[codes] + noise * random.standard_normal((len(codes), 16))).astype(np.float32)
    return features, codes, np.tile([FRONTAL] * 3 + [PROFILE] * 2, subjects), np.arange(len(codes))


def test_gallery_and_probes_are_counted() -> None:
    result = identify_mode(*people(20, 0.0), IndexSettings(), SETTINGS)
    assert (result.gallery, result.probes) == ("frontal", "profile")
    assert result.n_gallery_subjects == 16  # one subject in five is left out
    assert result.n_gallery == 48
    assert result.n_mated == 32
    assert result.n_non_mated == 8
    assert result.rank["1"].value == 1.0
    assert result.fnir["1e-1"].value is None
    assert result.fnir["1e-1"].reason


def test_rank_one_agrees_with_a_search_written_out() -> None:
    features, subjects, classes, each = people(40, 0.9)
    result = identify_mode(features, subjects, classes, each, IndexSettings(), SETTINGS)
    left_out = np.random.default_rng(SETTINGS.seed).permutation(40)[:8]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    gallery = np.flatnonzero((classes == FRONTAL) & ~np.isin(subjects, left_out))
    mated = np.flatnonzero((classes == PROFILE) & ~np.isin(subjects, left_out))
    nearest = gallery[(unit[mated] @ unit[gallery].T).argmax(axis=1)]
    expected = np.mean(subjects[nearest] == subjects[mated])
    assert 0.3 < expected < 1
    assert result.rank["1"].value == pytest.approx(expected)
    assert result.index_rank["1"] == pytest.approx(expected)
    assert result.index_recall == {"1": 1.0, "10": 1.0}


def test_lossy_index_shows_its_loss() -> None:
    features, subjects, classes, each = people(200, 0.9)
    lossy = IndexSettings(factory="IVF16,PQ2x4", nprobe=1)
    result = identify_mode(features, subjects, classes, each, lossy, SETTINGS)
    assert result.index_recall["10"] < 0.9
    assert result.index_rank["1"] < result.rank["1"].value


def test_without_poses_the_first_row_is_enrolled() -> None:
    features, subjects, classes, each = people(20, 0.0)
    result = identify_mode(features, subjects, np.full_like(classes, UNKNOWN), each, IndexSettings(), SETTINGS)
    assert (result.gallery, result.probes) == ("first row", "other rows")
    assert result.n_gallery == 16
    assert result.n_mated == 64


def test_nothing_to_find_is_none() -> None:
    features, subjects, classes, each = people(1, 0.0)
    assert identify_mode(features, subjects, classes, each, IndexSettings(), SETTINGS) is None
    alone = np.arange(5)
    assert identify_mode(features, alone, classes, each, IndexSettings(), SETTINGS) is None


def test_copies_as_only_second_rows_give_no_search() -> None:
    """Each subject has one picture, stored twice: a search finds only the bytes of the probe itself."""
    random = np.random.default_rng(0)
    features = np.repeat(random.standard_normal((20, 16)).astype(np.float32), 2, axis=0)
    subjects = np.repeat(np.arange(20), 2)
    classes = np.tile([FRONTAL, PROFILE], 20)
    result = identify_mode(features, subjects, classes, subjects, IndexSettings(), SETTINGS)
    assert result.n_mated == 0
    assert result.rank["1"].value is None
    assert result.rank["1"].reason


def test_a_probe_does_not_find_its_copy() -> None:
    """Copies of profile probes are enrolled under the label frontal: the rates stay those without the copies."""
    features, subjects, classes, each = people(30, 1.2)
    probes = np.flatnonzero(classes == PROFILE)
    plain = identify_mode(features, subjects, classes, each, IndexSettings(), SETTINGS)
    doubled = identify_mode(
        np.concatenate([features, features[probes]]),
        np.concatenate([subjects, subjects[probes]]),
        np.concatenate([classes, np.full(len(probes), FRONTAL)]),
        np.concatenate([each, each[probes]]),
        IndexSettings(),
        SETTINGS,
    )
    assert doubled.n_mated == plain.n_mated
    # The other profile row of the subject is enrolled now, so more may be found, but not all, as the copies would.
    assert plain.rank["1"].value < doubled.rank["1"].value < 1
    assert doubled.index_rank["1"] == doubled.rank["1"].value


def test_the_search_runs_on_the_device_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(*arguments: object, device: str) -> object:
        asked.append(device)
        return exact_search(*arguments, device="cpu")

    monkeypatch.setattr(identification, "exact_search", spy)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for device in ("auto", "cpu", "cuda"):
        identify_mode(*people(20, 0.5), IndexSettings(), EvaluationSettings(device=device))
    assert asked == ["cuda"] * 2 + ["cpu"] * 2 + ["cuda"] * 2  # without and with expansion


def test_expansion_uses_the_gallery_alone_and_is_compared_by_rows_enrolled() -> None:
    """Subjects have one, two or five frontal rows; expected ranks are written out with NumPy."""
    random = np.random.default_rng(1)
    rows = np.tile([1, 2, 5], 20)
    subjects = np.concatenate([np.repeat(np.arange(60), rows), np.repeat(np.arange(60), 2)])
    classes = np.repeat([FRONTAL, PROFILE], [rows.sum(), 120])
    centres = random.standard_normal((60, 16))
    features = (centres[subjects] + 1.3 * random.standard_normal((len(subjects), 16))).astype(np.float32)
    settings = EvaluationSettings(resamples=50)
    result = identify_mode(features, subjects, classes, np.arange(len(subjects)), IndexSettings(), settings, 3)
    left_out = np.random.default_rng(0).permutation(60)[:12]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    gallery = np.flatnonzero((classes == FRONTAL) & ~np.isin(subjects, left_out))
    mated = np.flatnonzero((classes == PROFILE) & ~np.isin(subjects, left_out))
    cosines = unit[mated] @ unit[gallery].T
    near = np.argsort(-cosines, axis=1)[:, :3]
    weights = np.take_along_axis(cosines, near, 1).clip(0) ** 3
    moved = unit[mated] + (weights[..., None] * unit[gallery][near]).sum(axis=1)
    plain, hits = (
        subjects[gallery][(queries @ unit[gallery].T).argmax(axis=1)] == subjects[mated]
        for queries in (unit[mated], moved)
    )
    expansion = result.expansion
    assert (expansion.rows, [group.enrolled for group in expansion.groups]) == (3, ["any", "1", "2 to 4", "5 or more"])
    for group, enrolled in zip(expansion.groups, (None, 1, 2, 5), strict=True):
        among = np.full(len(mated), enrolled is None) | (rows[subjects[mated]] == enrolled)
        assert group.n_mated == among.sum()
        assert group.rank["1"].value == pytest.approx(hits[among].mean())
        assert group.rank_difference["1"].value == pytest.approx(hits[among].mean() - plain[among].mean())
        assert group.rank_difference["1"].low <= group.rank_difference["1"].value <= group.rank_difference["1"].high
        assert group.fnir_difference["1e-1"].value is not None
        assert group.fnir_difference["1e-3"].reason
    assert hits.sum() != plain.sum()
