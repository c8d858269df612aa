"""Counts by pair of clusters, and the variance built on them, against loops over every pair."""

import numpy as np
import pytest
import torch

from metrics.allpairs import AllPairs, all_pairs
from metrics.bootstrap import paired_bootstrap, relative_bootstrap
from metrics.dyads import count_dyads
from metrics.pair_counts import Rows
from metrics.variance import Influence
from schemas.metrics import ALL, EER, MetricId

EDGES = {(0, 0): [1024, 1100], (0, 1): [1040], (1, 1): [900, 1024]}
FNMR = MetricId.at("fnmr", 0.05)
Models = tuple[np.ndarray, list[np.ndarray], list[AllPairs]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Signs in 64 dimensions, so that every cosine is an exact k/32; two subjects a cluster, some duplicates."""
    random = np.random.default_rng(0)
    subject = np.concatenate([np.sort(random.integers(0, 16, 700)), np.sort(random.integers(0, 16, 300))])
    duplicate = np.arange(1000)
    duplicate[::40] = random.integers(0, 1000, 25)
    unit = torch.from_numpy(random.choice([-1.0, 1.0], (1000, 64)).astype(np.float32) / 8)
    return Rows(unit, subject // 2, subject, np.array([0, 700, 1000]), duplicate, 8)


@pytest.mark.parametrize("most_pairs", [10**9, 100_000])
def test_false_matches_of_every_dyad_are_those_of_a_matrix_of_all_scores(rows: Rows, most_pairs: int) -> None:
    scores = (rows.unit.double() @ rows.unit.double().T).numpy()
    impostor = (rows.subject[:, None] != rows.subject) & (rows.duplicate[:, None] != rows.duplicate)
    impostor &= np.triu(np.ones_like(impostor), 1)
    classes = np.repeat([0, 1], [700, 300])
    for (first, second), found in count_dyads(rows, EDGES, 2, most_pairs).items():
        inside = impostor & (classes[:, None] == first) & (classes == second)
        by_dyad = {}
        for low in range(8):
            for high in range(low + 1, 8):
                one, other = rows.cluster == low, rows.cluster == high
                here = inside & ((one[:, None] & other) | (other[:, None] & one))
                at = [int((here & (scores >= edge / 1024 - 1)).sum()) for edge in EDGES[first, second]]
                by_dyad[low, high] = (*at, int(here.sum()))
        got = sorted(zip(*found.matches.tolist(), found.pairs.tolist(), strict=True))
        assert found.row == {edge: at for at, edge in enumerate(EDGES[first, second])}
        if most_pairs > 10**6:
            assert (got, found.share) == (sorted(by_dyad.values()), 1.0)
        else:  # four groups of two clusters
            assert found.share == pytest.approx(4 / 28)
            assert set(got) <= set(by_dyad.values())


@pytest.fixture(scope="module")
def models() -> Models:
    random = np.random.default_rng(5)
    subjects = np.repeat(np.arange(40), random.integers(3, 9, 40))
    x = random.normal(size=(40, 12))[subjects] + random.normal(size=(len(subjects), 12)) * 0.9
    features = [x, x + 0.2 * random.normal(size=x.shape)]
    return subjects, features, [all_pairs(one, subjects, fmr_points=(0.05, 1e-3)) for one in features]


@pytest.mark.parametrize("metric", [EER, FNMR])
def test_the_interval_of_a_difference_is_that_of_summing_over_all_pairs_of_pairs(
    metric: MetricId, models: Models
) -> None:
    """Influences are computed again from single scores; two pairs count together where they share a subject."""
    subjects, features, results = models
    n = 40
    one, other = np.triu_indices(len(subjects), 1)
    same = subjects[one] == subjects[other]
    totals = []
    for x in features:
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        scores = (unit[one] * unit[other]).sum(axis=1)
        edges = np.arange(2050) / 1024 - 1
        fmr = np.array([(scores[~same] >= t).mean() for t in edges])
        fnmr = np.array([(scores[same] < t).mean() for t in edges])
        reached = np.floor(0.05 * (~same).sum()) / (~same).sum()
        at = int(np.argmin(np.abs(np.log(np.maximum(fmr, 1e-9) / reached))))
        at = int(np.argmin(np.abs(fmr - fnmr))) if metric == EER else at
        near = (fmr <= 2 * fmr[at]) & (fmr >= fmr[at] / 2)
        slope = -np.polyfit(np.log(fmr[near]), fnmr[near], 1)[0] / fmr[at]
        influence = np.where(
            same,
            ((scores < edges[at]) - fnmr[at]) / same.sum(),
            slope * ((scores >= edges[at]) - fmr[at]) / (~same).sum(),
        ) / (1 + slope if metric == EER else 1)
        dyads, genuine = np.zeros((n, n)), np.zeros(n)
        np.add.at(dyads, (subjects[one][~same], subjects[other][~same]), influence[~same])
        np.add.at(genuine, subjects[one][same], influence[same])
        dyads += dyads.T
        own = np.bincount(subjects[one][same], minlength=n) / same.sum()
        touching = np.zeros(n)
        for end in (one, other):
            np.add.at(touching, subjects[end][~same], 1 / (~same).sum())
        totals.append((genuine / (1 - own) + dyads.sum(axis=1) / (1 - touching), dyads))
    of_subjects, of_dyads = (after - before for before, after in zip(*totals, strict=True))
    variance = (n - 1) / n * (of_subjects**2).sum() - np.triu(of_dyads**2, 1).sum()
    found = results[1].overall.influences[metric].minus(results[0].overall.influences[metric])
    np.testing.assert_allclose(found.subjects, of_subjects, atol=1e-12)
    assert found.standard_error() == pytest.approx(np.sqrt(variance), rel=1e-9)
    interval = paired_bootstrap(*results, resamples=10)[ALL][metric]
    half = found.interval(0.0, 0.95).high
    assert (interval.low, interval.high) == (interval.value - half, interval.value + half)


def test_few_false_matches_and_equal_modes(models: Models) -> None:
    _, _, (base, other) = models
    few = MetricId.at("fnmr", 1e-3)
    assert base.overall.verification.n_impostor * 1e-3 < 30
    assert few not in base.overall.influences
    assert paired_bootstrap(base, other, resamples=100)[ALL][few].low is not None  # from the draws
    same = paired_bootstrap(base, base, resamples=10)[ALL][FNMR]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    rates = [one.overall.estimates()[FNMR].value for one in (base, other)]
    absolute, relative = (f(base, other, resamples=10)[ALL][FNMR] for f in (paired_bootstrap, relative_bootstrap))
    assert relative.value == pytest.approx(absolute.value / rates[0])
    error = (np.log1p(relative.high) - np.log1p(relative.low)) / (absolute.high - absolute.low)
    assert error == pytest.approx(1 / rates[1], rel=0.15)  # d ln(b/a) = (db - da b/a) / b, and b/a is near 1
    assert np.log1p([relative.low, relative.high]).mean() == pytest.approx(np.log1p(relative.value))


def test_a_few_subjects_with_most_of_the_influence_leave_few_degrees_of_freedom() -> None:
    even = Influence(np.tile([1.0, -1.0], 50), (), 1.0)
    assert even.degrees_of_freedom() == 99
    uneven = Influence(np.concatenate([[10.0, -10.0], np.full(98, 0.01)]), (), 1.0)
    assert uneven.degrees_of_freedom() == pytest.approx(200 / (100 * 2e4 / 200**2 - 1), rel=0.01)
