"""`all_pairs` is compared with a matrix of all scores, sorted.

Rows are integer vectors of norm 1024, so every cosine is a multiple of 2^-20 and comes out of any float32 product
exactly: the comparison can demand equality, not closeness.
"""

from itertools import combinations
from math import isqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from metrics.allpairs import AllPairs, all_pairs
from metrics.verification import verify

NAMES = ("frontal", "profile", "unknown")
REAL = Path("../shared/data/cfp-dev-fr512")


def exact_rows(features: np.ndarray) -> np.ndarray:
    """Integer vectors of norm 1024 near the given directions: four added entries make up the difference."""
    scaled = np.trunc(features / np.linalg.norm(features, axis=1, keepdims=True) * 1020).astype(np.int64)
    added = [four_squares(2**20 - int(rest)) for rest in (scaled**2).sum(axis=1)]
    rows = np.hstack([scaled, np.array(added)])
    assert ((rows**2).sum(axis=1) == 2**20).all()
    return rows


def four_squares(number: int) -> tuple[int, int, int, int]:
    for a in range(isqrt(number), -1, -1):
        for b in range(isqrt(number - a * a), -1, -1):
            for c in range(isqrt(number - a * a - b * b), -1, -1):
                rest = number - a * a - b * b - c * c
                if isqrt(rest) ** 2 == rest:
                    return a, b, c, isqrt(rest)
                if rest > 2 * c:  # a smaller c leaves more than one square can fill without a larger c
                    break
    raise AssertionError("Lagrange: every number is a sum of four squares")


def people(n_rows: int, n_subjects: int, seed: int, dim: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    subjects = random.integers(0, n_subjects, n_rows)
    centres = random.normal(size=(n_subjects, dim))
    features = centres[subjects] + random.normal(size=(n_rows, dim)) * 0.7
    return exact_rows(features), subjects * 7 - 3, random.integers(0, len(NAMES), n_rows)


def scores_by_cell(
    rows: np.ndarray, subjects: np.ndarray, classes: np.ndarray, duplicates: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Genuine and impostor scores of every cell, from the whole matrix."""
    scores = (rows / 1024) @ (rows / 1024).T
    first, second = np.triu_indices(len(rows), 1)
    counts = duplicates[first] != duplicates[second]
    first, second = first[counts], second[counts]
    score, same = scores[first, second], subjects[first] == subjects[second]
    low, high = np.minimum(classes[first], classes[second]), np.maximum(classes[first], classes[second])
    found = {"all": (score[same], score[~same])}
    for a, one in enumerate(NAMES):
        for b, other in enumerate(NAMES):
            inside = (low == a) & (high == b)
            found[f"{one}-{other}"] = (score[inside & same], score[inside & ~same])
    return found


def assert_equals_sorting(result: AllPairs, expected: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    thresholds = {point.target_fmr: point.threshold for point in verify(*expected["all"]).points}
    for cell in result:
        genuine, impostor = expected[cell.name]
        reference = verify(genuine, impostor)
        assert cell.verification.points == reference.points
        assert cell.verification.eer == reference.eer
        assert cell.verification.auc == reference.auc
        assert (cell.verification.n_genuine, cell.verification.n_impostor) == (len(genuine), len(impostor))
        if reference.d_prime is None:
            assert cell.verification.d_prime is None
        else:
            assert cell.verification.d_prime == pytest.approx(reference.d_prime, rel=1e-9)
        for point in cell.at_global:
            assert point.threshold == thresholds[point.target_fmr]
            if point.threshold is not None:
                assert point.fmr == (np.mean(impostor >= point.threshold) if len(impostor) else None)
                assert point.fnmr == (np.mean(genuine < point.threshold) if len(genuine) else None)
        assert cell.histogram.genuine.sum() == len(genuine)
        assert cell.histogram.impostor.sum() == len(impostor)


@pytest.fixture(scope="module")
def crowd() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return people(5000, 400, seed=0)


@pytest.mark.parametrize(
    ("n_rows", "with_duplicates"), [(1500, False), pytest.param(5000, True, marks=pytest.mark.e2e)]
)
def test_thousands_of_rows_equal_sorting_millions_of_scores(
    crowd: tuple[np.ndarray, np.ndarray, np.ndarray], n_rows: int, with_duplicates: bool
) -> None:
    rows, subjects, classes = (part[:n_rows] for part in crowd)
    duplicates = np.arange(len(rows))
    if with_duplicates:
        # Copies under the same subject, under another subject, in another class, far apart in the order of the tiles.
        random = np.random.default_rng(1)
        rows = rows.copy()
        for _ in range(200):
            copy, original = random.integers(0, len(rows), 2)
            rows[copy], duplicates[copy] = rows[original], duplicates[original]
    result = all_pairs(rows, subjects, classes=classes, class_names=NAMES, duplicates=duplicates)
    expected = scores_by_cell(rows, subjects, classes, duplicates)
    assert_equals_sorting(result, expected)
    n_pairs = len(expected["all"][0]) + len(expected["all"][1])
    assert (n_pairs < n_rows * (n_rows - 1) // 2) == with_duplicates


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_small_set_equals_comparing_pair_by_pair(data: st.DataObject) -> None:
    n_rows = data.draw(st.integers(0, 14))
    codes = st.lists(st.integers(0, 3), min_size=n_rows, max_size=n_rows).map(lambda c: np.array(c, dtype=np.int64))
    subjects, duplicates = data.draw(codes), data.draw(codes) + data.draw(codes) * 4
    classes = data.draw(codes) % len(NAMES)
    # Few directions, so that nearly all scores tie; opposite and equal ones among them.
    directions = np.vstack([np.eye(3), -np.eye(3), [[0.6, 0.8, 0], [0, 0.6, -0.8]]])
    picks = data.draw(st.lists(st.integers(0, 7), min_size=n_rows, max_size=n_rows))
    rows = exact_rows(directions[picks]) if n_rows else np.empty((0, 7))
    result = all_pairs(
        rows, subjects, classes=classes, class_names=NAMES, duplicates=duplicates, fmr_points=[0.3, 0.05]
    )
    genuine, impostor = [], []
    for i, j in combinations(range(n_rows), 2):
        if duplicates[i] != duplicates[j]:
            (genuine if subjects[i] == subjects[j] else impostor).append(float(rows[i] @ rows[j] / 2**20))
    found, expected = result.overall.verification, verify(genuine, impostor, [0.3, 0.05])
    assert found.points == expected.points
    assert (found.eer, found.auc) == (expected.eer, expected.auc)
    assert (found.n_genuine, found.n_impostor) == (len(genuine), len(impostor))


def test_counts_by_cluster_are_those_of_the_pairs(crowd: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    rows, subjects, classes = (array[:700] for array in crowd)
    result = all_pairs(rows, subjects, classes=classes, class_names=NAMES, max_clusters=23)
    assert np.unique(result.clusters).tolist() == list(range(23))
    scores = (rows / 1024) @ (rows / 1024).T
    bins = np.floor((scores + 1) * 1024).astype(int)
    genuine, ends = np.zeros((2, 23, 2049), dtype=int)
    for i, j in combinations(range(700), 2):
        if subjects[i] == subjects[j]:
            genuine[result.clusters[i], bins[i, j]] += 1
        else:
            ends[result.clusters[i], bins[i, j]] += 1
            ends[result.clusters[j], bins[i, j]] += 1
    np.testing.assert_array_equal(result.overall.counts.genuine, genuine)
    np.testing.assert_array_equal(result.overall.counts.impostor_ends, ends)
    for name in ("genuine", "impostor_ends"):
        parts = sum(getattr(cell.counts, name) for cell in result.cells.values())
        np.testing.assert_array_equal(parts, getattr(result.overall.counts, name))


def test_a_subject_is_one_cluster_while_there_are_few_and_clusters_are_even_when_there_are_many() -> None:
    rows, subjects, _ = people(300, 60, seed=3)
    alone = all_pairs(rows, subjects).clusters
    assert len(np.unique(alone)) == len(np.unique(subjects)) == len(np.unique(alone * 10_000 + subjects))
    dealt = all_pairs(rows, subjects, max_clusters=7).clusters
    sizes = [len(np.unique(subjects[dealt == cluster])) for cluster in range(7)]
    assert max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(dealt, all_pairs(rows * 2, subjects, max_clusters=7).clusters)


def test_without_classes_there_is_only_the_total() -> None:
    rows, subjects, _ = people(50, 10, seed=4)
    result = all_pairs(rows, subjects)
    assert result.cells == {}
    assert [cell.name for cell in result] == ["all"]
    assert result.overall.verification.n_genuine + result.overall.verification.n_impostor == 50 * 49 // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subjects": np.arange(9)}, "subjects: int64 of shape"),
        ({"subjects": np.arange(10) / 2}, "subjects: float64"),
        ({"classes": np.full(10, 3), "class_names": NAMES}, "there are 3 class names"),
        ({"classes": np.full(10, -1), "class_names": NAMES}, "classes hold -1"),
        ({"duplicates": np.arange(3)}, "duplicates: int64 of shape"),
        ({"features": np.zeros((10, 4))}, "feature row"),
        ({"max_clusters": 0}, "max_clusters = 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, np.ndarray | int], message: str) -> None:
    arguments = {"features": np.eye(10), "subjects": np.arange(10), **change}
    with pytest.raises(ValueError, match=message):
        all_pairs(**arguments)


@pytest.mark.skipif(not REAL.exists(), reason="real embeddings are not here (../shared/data)")
def test_raw_embeddings_of_real_faces_give_the_published_rates() -> None:
    import polars as pl

    table = pl.read_parquet(REAL / "*.parquet", columns=["subject", "pose", "embedding"])
    features = table["embedding"].to_numpy()
    subjects = np.unique(table["subject"].to_numpy(), return_inverse=True)[1]
    classes = (table["pose"] == "profile").to_numpy().astype(np.int64)
    result = all_pairs(features, subjects, classes=classes, class_names=NAMES[:2])

    unit = features / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    profile = np.flatnonzero(classes == 1)
    scores = unit[profile] @ unit[classes == 0].T
    same = subjects[profile][:, None] == subjects[classes == 0]
    cell = result.cells["frontal-profile"].verification
    assert (cell.n_genuine, cell.n_impostor) == (same.sum(), (~same).sum())
    assert cell.auc == pytest.approx(roc_auc_score(same.ravel(), scores.ravel()), abs=1e-6)
    fpr, tpr, _ = roc_curve(same.ravel(), scores.ravel(), drop_intermediate=False)
    for point in cell.points:
        # One genuine score may lie within the rounding of the threshold.
        assert point.fnmr == pytest.approx(1 - tpr[fpr <= point.target_fmr].max(), abs=1e-6 + 1 / cell.n_genuine)
    crossing = np.argmin(np.abs(fpr - (1 - tpr)))
    assert cell.eer.value == pytest.approx((fpr[crossing] + 1 - tpr[crossing]) / 2, abs=1e-6)
    # Published with the data for 500 subjects, of which these are 350: EER 11.47 and 1.02 percent.
    assert cell.eer.value == pytest.approx(0.1147, abs=0.01)
    assert result.cells["frontal-frontal"].verification.eer.value == pytest.approx(0.0102, abs=0.002)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_counts_the_same(crowd: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    rows, subjects, classes = crowd
    result = all_pairs(rows, subjects, classes=classes, class_names=NAMES, device="cuda")
    assert_equals_sorting(result, scores_by_cell(rows, subjects, classes, np.arange(len(rows))))
