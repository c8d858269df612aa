import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import identification
from metrics.identification import exact_search, identification_difference, identify, recall_at_k


def test_ranks_by_hand() -> None:
    subjects = np.array([[1, 2, 3], [1, 1, 2], [3, 2, 1], [2, 3, -1]])
    scores = np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7], [0.9, 0.9, 0.1], [0.5, 0.4, 0.0]])
    probes = np.array([1, 2, 2, 9])
    result = identify(subjects, scores, probes, np.ones(4, dtype=bool), ranks=(1, 2, 3), fpir_points=())
    # Probe 0: rank 1. Probe 1: subject 1 takes one place with its two samples, so rank 2. Probe 2: a tie counts
    # against it, rank 2. Probe 3: not found although the whole gallery was shown.
    assert [rank.value for rank in result.rank.values()] == [0.25, 0.75, 0.75]
    assert (result.n_mated, result.n_non_mated) == (4, 0)


def test_a_list_that_is_cut_off_cannot_show_a_deep_rank() -> None:
    subjects, scores = np.array([[1, 1, 2]]), np.array([[0.9, 0.8, 0.7]])
    result = identify(subjects, scores, np.array([5]), np.array([True]), ranks=(1, 2, 3), fpir_points=())
    assert [rank.value for rank in result.rank.values()] == [0.0, 0.0, None]
    assert result.rank[3].reason == "the lists of 1 probes end before they show 3 subjects; search deeper (larger k)"


def test_fnir_at_fpir_by_hand() -> None:
    # Ten non-mated probes whose best candidates score 0.0 … 0.9, five mated probes, one of them not found.
    non_mated = np.arange(10) / 10
    own = np.array([0.95, 0.85, 0.75, 0.3])
    subjects = np.concatenate([np.full(10, 1), np.array([11, 12, 13, 14]), [1]])[:, None]
    scores = np.concatenate([non_mated, own, [0.99]])[:, None]
    probes = np.concatenate([np.full(10, 99), [11, 12, 13, 14], [15]])
    mated = probes != 99
    result = identify(subjects, scores, probes, mated, ranks=(1,), fpir_points=(0.2, 0.1, 0.01))
    two, one, none = result.fnir.values()
    # At most two of ten non-mated probes: the first score above 0.7 is the mated 0.75; 0.3 and the lost one miss.
    assert two.value == 0.4
    assert one.value == 0.6
    assert none.value is None
    assert none.reason == "FPIR 0.01 needs 100 non-mated probes or more; found 10"


def test_without_probes_of_a_kind_nothing_is_claimed() -> None:
    lists = np.array([[1], [1]]), np.array([[0.5], [0.5]])
    only_non_mated = identify(*lists, np.array([7, 8]), np.zeros(2, dtype=bool), fpir_points=(0.5,))
    assert {rank.reason for rank in only_non_mated.rank.values()} == {"no mated probe"}
    assert only_non_mated.fnir[0.5].reason == "no mated probe"
    only_mated = identify(*lists, np.array([1, 1]), np.ones(2, dtype=bool), fpir_points=(0.5,))
    assert only_mated.fnir[0.5].value is None
    assert only_mated.rank[1].value == 1.0
    tied = identify(*lists, np.array([1, 8]), np.array([True, False]), fpir_points=(0.5,))
    assert tied.fnir[0.5].reason == "FPIR 0.5 needs 2 non-mated probes or more; found 1"


def test_a_tie_of_impostors_above_all_mated_scores_is_not_estimable() -> None:
    subjects, scores = np.full((4, 1), 1), np.array([[0.9], [0.9], [0.9], [0.5]])
    result = identify(
        subjects, scores, np.array([7, 8, 9, 1]), np.array([False, False, False, True]), fpir_points=(0.5,)
    )
    assert result.fnir[0.5].reason == "too many non-mated probes tie at the largest score for FPIR 0.5"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rates_equal_looking_at_every_subject(seed: int) -> None:
    random = np.random.default_rng(seed)
    gallery_subjects = random.integers(0, 6, 12)
    gallery, probes = random.integers(-2, 3, (12, 3)) + 0.5, random.integers(-2, 3, (20, 3)) + 0.5
    probe_subjects = random.integers(0, 9, 20)
    mated = np.isin(probe_subjects, gallery_subjects)
    scores, rows = exact_search(gallery, probes, 12)
    result = identify(gallery_subjects[rows], scores, probe_subjects, mated, ranks=(1, 2, 4), fpir_points=(0.4,))

    best: dict[tuple[int, int], float] = {}
    for probe in range(20):
        for row, score in zip(rows[probe], scores[probe], strict=True):
            key = probe, int(gallery_subjects[row])
            best[key] = max(best.get(key, -1.0), float(score))
    enrolled = set(gallery_subjects.tolist())
    for rank, found in result.rank.items():
        hits = [
            sum(best[p, other] >= best[p, probe_subjects[p]] for other in enrolled) <= rank
            for p in np.flatnonzero(mated)
        ]
        assert found.value == (np.mean(hits) if hits else None)
    if (fnir := result.fnir[0.4].value) is not None:
        alarms = np.array([max(best[p, s] for s in enrolled) for p in np.flatnonzero(~mated)])
        hits = np.array([best[p, probe_subjects[p]] for p in np.flatnonzero(mated)])
        threshold = min(score for score in {*alarms, *hits} if np.mean(alarms >= score) <= 0.4)
        assert fnir == np.mean(hits < threshold)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate_scores": np.array([[0.1, 0.2]])}, "not sorted"),
        ({"candidate_subjects": np.array([[-1, 2]])}, "not sorted"),
        ({"candidate_scores": np.array([[np.nan, 0.2]])}, "NaN"),
        ({"probe_subjects": np.array([1, 2])}, "shapes"),
        ({"mated": np.array([False])}, "called non-mated"),
    ],
)
def test_contradictions_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    arguments = {
        "candidate_subjects": np.array([[1, 2]]),
        "candidate_scores": np.array([[0.2, 0.1]]),
        "probe_subjects": np.array([1]),
        "mated": np.array([True]),
    }
    with pytest.raises(ValueError, match=message):
        identify(**{**arguments, **change})


def test_exact_search_equals_sorting_all_scores_and_breaks_ties_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identification, "_BLOCK", (64, 700))  # several blocks both ways
    monkeypatch.setattr(identification, "_FIRST_ROWS", 90)
    random = np.random.default_rng(0)
    # Signs in 64 dimensions: cosines are exact multiples of 1/32, so most scores tie.
    gallery, probes = random.choice([-1.0, 1.0], (3000, 64)), random.choice([-1.0, 1.0], (150, 64))
    scores, rows = exact_search(gallery * 3, probes * 5, 10)
    cosines = probes @ gallery.T / 64
    expected = np.argsort(-cosines, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(cosines, expected, axis=1))


def test_a_small_gallery_is_shown_whole() -> None:
    scores, rows = exact_search(np.eye(3)[:2], np.eye(3), 4)
    assert rows.tolist() == [[0, 1, -1, -1], [1, 0, -1, -1], [0, 1, -1, -1]]
    assert scores[0].tolist() == [1.0, 0.0, -np.inf, -np.inf]
    with pytest.raises(ValueError, match="k must be positive"):
        exact_search(np.eye(3), np.eye(3), 0)
    with pytest.raises(ValueError, match="gallery"):
        exact_search(np.eye(3), np.eye(4), 1)


def test_recall_by_hand() -> None:
    exact = np.array([[1, 2, 3], [4, 5, -1]])
    assert recall_at_k(exact, exact, 3) == 1.0
    assert recall_at_k(np.array([[2, 1, 9], [7, 8, -1]]), exact, 3) == 2 / 5
    assert recall_at_k(np.array([[1, 9], [4, 9]]), exact, 1) == 1.0
    with pytest.raises(ValueError, match="do not both hold 3"):
        recall_at_k(exact[:, :2], exact, 3)
    with pytest.raises(ValueError, match="nothing to compare"):
        recall_at_k(exact, np.full((2, 3), -1), 2)


def people(seed: int, subjects: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return candidates and scores of three probes a subject, whose luck goes by the subject; a quarter is no mate."""
    random = np.random.default_rng(seed)
    probe_subjects = np.repeat(np.arange(subjects), 3)
    mated = probe_subjects % 4 > 0
    skill = random.normal(0.6, 0.1, subjects)[probe_subjects]
    own = skill + random.normal(0, 0.1, len(probe_subjects))
    other = random.normal(0.4, 0.1, len(probe_subjects))
    candidates = np.full((len(own), 2), subjects)
    scores = np.stack([other, np.full(len(own), -1.0)], axis=1)
    candidates[mated, 1], scores[mated, 1] = probe_subjects[mated], own[mated]
    candidates[~mated, 1] = subjects + 1
    first = scores.argsort(axis=1)[:, ::-1]
    return np.take_along_axis(candidates, first, 1), np.take_along_axis(scores, first, 1), probe_subjects, mated


def test_intervals_are_those_of_searches_with_resampled_subjects() -> None:
    candidates, scores, probe_subjects, mated = people(0)
    found = identify(candidates, scores, probe_subjects, mated, ranks=(1,), fpir_points=(0.1,), resamples=200, seed=3)
    rates, fnirs = [], []
    for draw in np.random.default_rng(3).multinomial(80, np.full(80, 1 / 80), size=200):
        rows = np.repeat(np.arange(len(mated)), draw[probe_subjects])
        # A subject drawn twice is two people with one face: the search itself does not change.
        one = identify(
            candidates[rows], scores[rows], probe_subjects[rows], mated[rows], ranks=(1,), fpir_points=(0.1,)
        )
        rates.append(one.rank[1].value)
        fnirs.append(one.fnir[0.1].value)
    np.testing.assert_allclose((found.rank[1].low, found.rank[1].high), np.quantile(rates, [0.025, 0.975]))
    np.testing.assert_allclose((found.fnir[0.1].low, found.fnir[0.1].high), np.quantile(fnirs, [0.025, 0.975]))


def test_interval_of_a_rate_that_the_non_mated_probes_cannot_show_is_none() -> None:
    found = identify(*people(0), resamples=50, fpir_points=(1e-3,)).fnir[1e-3]
    assert (found.value, found.low) == (None, None)
    assert "needs 1000 non-mated probes" in found.reason


def test_intervals_need_two_subjects() -> None:
    one = np.zeros(3, dtype=np.int64)
    found = identify(one[:, None], np.ones((3, 1)), one, np.ones(3, dtype=bool), resamples=50)
    assert (found.rank[1].value, found.rank[1].low) == (1.0, None)


def test_two_searches_are_compared_on_the_same_draws_and_for_some_probes() -> None:
    """Probes of 30 subjects, and a second search with better scores: differences against draws written out."""
    random = np.random.default_rng(3)
    probes = np.repeat(np.arange(30), 10)
    mated, some = probes < 20, probes % 2 == 0
    names = np.stack([np.where(mated, probes, 0), np.full(300, 29)], axis=1)
    own, other = random.normal(0.5, 0.2, 300), random.normal(0.3, 0.15, 300)
    found = []
    for gain in (0.0, 0.1):
        scores = np.stack([np.where(mated, own + gain, -2.0), other], axis=1)
        order = np.argsort(-scores, axis=1)
        lists = np.take_along_axis(names, order, 1), np.take_along_axis(scores, order, 1)
        lists[0][~mated] = [29, -1]
        kept = probes != 29  # the gallery's other subject is nobody's own
        options = {"ranks": (1,), "fpir_points": (0.1,), "resamples": 300, "seed": 4}
        pieces = lists[0][kept], lists[1][kept], probes[kept], mated[kept]
        found.append([identify(*pieces, **options), identify(*pieces, among=some[kept], **options)])
    draws = np.random.default_rng(4).multinomial(29, np.full(29, 1 / 29), size=300)
    for which, among in ((0, mated), (1, mated & some)):
        plain, better = found[0][which], found[1][which]
        rank, fnir = identification_difference(plain, better)
        hits = [(own + gain > other)[among].astype(float) for gain in (0.0, 0.1)]
        assert (plain.n_mated, plain.n_non_mated) == (among.sum(), 90)
        assert rank[1].value == pytest.approx(hits[1].mean() - hits[0].mean())
        weights = draws[:, probes[among]]
        change = (weights @ hits[1] - weights @ hits[0]) / weights.sum(axis=1)
        np.testing.assert_allclose([rank[1].low, rank[1].high], np.quantile(change, [0.025, 0.975]))
        assert fnir[0.1].value == pytest.approx(better.fnir[0.1].value - plain.fnir[0.1].value)
        assert fnir[0.1].low < fnir[0.1].value < fnir[0.1].high <= 0
    without = identify(*pieces, ranks=(1,), fpir_points=(0.001,))
    rank, fnir = identification_difference(without, without)
    assert (rank[1].value, rank[1].low) == (0.0, None)
    assert (fnir[0.001].value, fnir[0.001].reason) == (None, "FPIR 0.001 needs 1000 non-mated probes or more; found 90")
