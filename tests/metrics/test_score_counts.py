import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.score_counts import ScoreCounts

SCORES = st.lists(st.integers(-5, 5).map(lambda number: number / 7), max_size=30)


@settings(deadline=None)
@given(SCORES, SCORES, st.lists(st.floats(-1, 1), min_size=1, max_size=5))
def test_counts_equal_comparing_every_score(genuine: list[float], impostor: list[float], others: list[float]) -> None:
    counts = ScoreCounts.from_scores(genuine, impostor)
    for threshold in [*genuine, *impostor, *others]:
        assert counts.false_matches(threshold) == sum(score >= threshold for score in impostor)
        assert counts.false_non_matches(threshold) == sum(score < threshold for score in genuine)
        observed = [*genuine, *impostor]
        assert counts.next_observed_above(threshold) == min((s for s in observed if s > threshold), default=None)
        assert counts.last_observed_below(threshold) == max((s for s in observed if s < threshold), default=None)
    assert (counts.n_genuine, counts.n_impostor) == (len(genuine), len(impostor))
    assert counts.impostor_counts().sum() == len(impostor)


def test_a_float64_threshold_between_two_float32_scores_is_not_rounded_onto_one() -> None:
    score = np.float32(0.1)  # 0.100000001490…
    counts = ScoreCounts.from_scores(np.array([score]), np.array([score]))
    barely_above = np.nextafter(float(score), 1.0)
    assert np.float32(barely_above) == score  # rounding the threshold would make the pair match
    assert counts.false_matches(barely_above) == 0
    assert counts.false_non_matches(barely_above) == 1
    assert counts.false_matches(float(score)) == 1


def test_scores_of_two_precisions_are_compared_in_the_finer_one() -> None:
    counts = ScoreCounts.from_scores(np.array([0.1], dtype=np.float64), np.array([0.1], dtype=np.float32))
    assert counts.false_matches(0.1) == 1  # float32(0.1) is the larger of the two
    assert counts.false_non_matches(float(np.float32(0.1))) == 1


@pytest.mark.parametrize("bad", [np.zeros((2, 2)), np.array([0.1, np.nan]), np.array([np.inf])])
def test_scores_that_cannot_be_ordered_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"genuine scores"):
        ScoreCounts.from_scores(bad, [0.0])
    with pytest.raises(ValueError, match=r"impostor scores"):
        ScoreCounts.from_scores([0.0], bad)
