from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.cosine import pair_scores
from metrics.folds import best_threshold, fold_accuracy

REAL = Path("../shared/data")


def test_by_hand_the_threshold_of_a_fold_comes_from_the_others() -> None:
    scores = np.array([0.9, 0.2, 0.6, 0.5, 0.7, 0.65])
    same = np.array([True, False, True, False, True, False])
    folds = np.array([1, 1, 2, 2, 3, 3])
    result = fold_accuracy(scores, same, folds)
    # Fold 1: on 2 and 3 the scores 0.6 and 0.7 are both right three times of four, the smaller is taken: 0.9 and 0.2
    # are right. Fold 2: 0.7 is best (0.65 errs); 0.6 is rejected wrongly. Fold 3: 0.6; 0.65 is accepted wrongly.
    assert result.thresholds == (0.6, 0.7, 0.6)
    assert result.accuracies == (1.0, 0.5, 0.5)
    assert result.mean == pytest.approx(2 / 3)
    assert result.sd == pytest.approx(np.sqrt(1 / 12))  # deviations 1/3, 1/6, 1/6; squares / (3 - 1)
    assert (result.n_pairs, result.folds) == (6, (1, 2, 3))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=25))
def test_best_threshold_is_the_first_of_the_best(pairs: list[tuple[int, bool]]) -> None:
    scores, same = np.array([pair[0] / 3 for pair in pairs]), np.array([pair[1] for pair in pairs])
    candidates = [*sorted(set(scores.tolist())), np.inf]
    accuracy = [np.mean((scores >= threshold) == same) for threshold in candidates]
    assert best_threshold(scores, same) == candidates[int(np.argmax(accuracy))]


def test_a_threshold_never_sees_its_own_fold() -> None:
    random = np.random.default_rng(0)
    scores, same, folds = random.normal(size=300), random.random(300) < 0.5, np.repeat([0, 1, 2], 100)
    before = fold_accuracy(scores, same, folds)
    changed = scores.copy()
    changed[folds == 1] = random.normal(size=100)
    after = fold_accuracy(changed, same, folds)
    assert after.thresholds[1] == before.thresholds[1]
    assert after.thresholds[0] != before.thresholds[0]


@pytest.mark.parametrize(
    ("scores", "folds", "message"),
    [
        (np.zeros(3), np.array([0, 1]), "one length"),
        (np.zeros(3), np.zeros(3, dtype=int), "1 fold"),
        (np.array([0, 1, np.nan]), np.array([0, 1, 1]), "NaN"),
    ],
)
def test_what_cannot_be_folded_is_refused(scores: np.ndarray, folds: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fold_accuracy(scores, np.ones(3, dtype=bool), folds)


@pytest.mark.skipif(not REAL.exists(), reason="real embeddings are not here (../shared/data)")
def test_official_pairs_of_real_faces_give_the_published_accuracy() -> None:
    import polars as pl

    table = pl.read_parquet(REAL / "cfp-dev-fr512" / "*.parquet", columns=["id", "embedding"])
    row_of = {name: row for row, name in enumerate(table["id"])}
    pairs = pl.read_parquet(REAL / "cfp-dev-pairs.parquet")
    pairs = pairs.filter(pl.col("id_a").is_in(list(row_of)) & pl.col("id_b").is_in(list(row_of)))
    first, second = (np.array([row_of[name] for name in pairs[column]]) for column in ("id_a", "id_b"))
    scores = pair_scores(table["embedding"].to_numpy(), first, second)
    same, folds, protocols = (pairs[name].to_numpy() for name in ("same", "fold", "protocol"))
    result = {
        name: fold_accuracy(scores[protocols == name], same[protocols == name], folds[protocols == name])
        for name in ("FF", "FP")
    }
    assert len(result["FP"].folds) == 7
    assert result["FP"].mean == pytest.approx(0.8966, abs=0.01)  # published: 89.66 ± 1.82 over ten folds
    assert result["FP"].sd == pytest.approx(0.0182, abs=0.01)
    assert result["FF"].mean > 0.98
