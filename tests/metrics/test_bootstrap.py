"""Draws are compared with a bootstrap that weighs every single pair, intervals with a truth, in many simulations."""

from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
import pytest
import torch

from metrics.allpairs import AllPairs, Cell, ClusterCounts, all_pairs
from metrics.bootstrap import bootstrap, draw, draw_subjects, paired_bootstrap, relative_bootstrap
from metrics.score_counts import ScoreCounts
from metrics.verification import OperatingPoint, det_curve, rates_at, score_histogram, summarise
from schemas.metrics import AUC, EER, MetricId

TARGETS = (0.1, 0.01)
PER_SUBJECT = 4
# Scores: genuine = mean + subject's own shift + noise; impostor = shift of either subject + noise.
GENUINE_SUBJECT, GENUINE_NOISE, IMPOSTOR_SUBJECT, IMPOSTOR_NOISE = 0.04, 0.04, 0.015, 0.04


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrix products are slower with threads, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Simulation:
    """Scores of all pairs of simulated subjects in two modes that share the subjects and half of the noise."""

    def __init__(self, n_subjects: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.n_subjects = n_subjects
        self.first, self.second = np.triu_indices(n_subjects, 1)
        self.owner = np.repeat(np.arange(n_subjects), PER_SUBJECT)
        own = random.normal(0, GENUINE_SUBJECT, n_subjects)[self.owner]
        shift = random.normal(0, IMPOSTOR_SUBJECT, n_subjects)
        pair = shift[self.first] + shift[self.second]
        half = np.sqrt(0.5)
        genuine_noise = random.normal(0, GENUINE_NOISE * half, (3, len(own)))
        impostor_noise = random.normal(0, IMPOSTOR_NOISE * half, (3, len(pair)))
        self.genuine = own + genuine_noise[0] + genuine_noise[1:]
        self.impostor = pair + impostor_noise[0] + impostor_noise[1:]

    def result(self, mean: float, mode: int = 0) -> AllPairs:
        genuine, impostor = self.genuine[mode] + mean, self.impostor[mode]
        scores = ScoreCounts.from_scores(genuine, impostor)
        verification = summarise(scores, TARGETS)
        at_global = tuple(
            OperatingPoint(point.target_fmr, point.threshold, *rates_at(scores, point.threshold))
            for point in verification.points
            if point.threshold is not None
        )
        counts = ClusterCounts(
            genuine=self.by_subject(self.owner, genuine),
            impostor_ends=self.by_subject(self.first, impostor) + self.by_subject(self.second, impostor),
        )
        cell = Cell("all", verification, at_global, det_curve(scores), score_histogram(scores), counts)
        return AllPairs(cell, {}, np.arange(self.n_subjects))

    def by_subject(self, subjects: np.ndarray, scores: np.ndarray) -> np.ndarray:
        keys = subjects * 2049 + np.floor((scores + 1) * 1024).astype(np.int64)
        return np.bincount(keys, minlength=self.n_subjects * 2049).reshape(-1, 2049)


def truth(mean: float) -> dict[str, float]:
    """The metrics of infinitely many subjects, in closed form."""
    impostor = NormalDist(0, np.sqrt(2 * IMPOSTOR_SUBJECT**2 + IMPOSTOR_NOISE**2))
    genuine = NormalDist(mean, np.sqrt(GENUINE_SUBJECT**2 + GENUINE_NOISE**2))
    crossing = mean * impostor.stdev / (impostor.stdev + genuine.stdev)
    return {
        "eer": genuine.cdf(crossing),
        "auc": NormalDist().cdf(mean / np.hypot(impostor.stdev, genuine.stdev)),
        "fnmr@0.1": genuine.cdf(impostor.inv_cdf(0.9)),
        "fnmr@0.01": genuine.cdf(impostor.inv_cdf(0.99)),
    }


@pytest.mark.e2e
def test_95_percent_intervals_cover_the_truth_in_95_of_100_experiments() -> None:
    known, other = truth(0.1), truth(0.11)
    covered: dict[str, list[bool]] = {}
    for seed in range(400):
        simulation = Simulation(200, seed)
        base, better = simulation.result(0.1), simulation.result(0.11, mode=1)
        single = bootstrap(base, resamples=200, seed=seed)["all"]
        difference = paired_bootstrap(base, better, resamples=200, seed=seed)["all"]
        intervals = {
            "eer": (single[EER], known["eer"]),
            "auc": (single[AUC], known["auc"]),
            "fnmr@0.1": (single[MetricId.at("fnmr", 0.1)], known["fnmr@0.1"]),
            "fnmr@0.01": (single[MetricId.at("fnmr", 0.01)], known["fnmr@0.01"]),
            "difference of eer": (difference[EER], other["eer"] - known["eer"]),
            "difference of fnmr@0.1": (difference[MetricId.at("fnmr", 0.1)], other["fnmr@0.1"] - known["fnmr@0.1"]),
        }
        for name, (interval, value) in intervals.items():
            assert interval.low is not None
            assert interval.high is not None
            covered.setdefault(name, []).append(interval.low <= value <= interval.high)
    share = {name: float(np.mean(hits)) for name, hits in covered.items()}
    for name, value in share.items():
        # A share of 400 experiments has a standard error of 1.1 points. Differences may be covered more often: the few
        # scores between two nearby thresholds change with the draw as well as with the subjects.
        assert 0.93 <= value <= (0.985 if name.startswith("difference") else 0.97), share


def test_draws_equal_those_of_weighing_every_pair() -> None:
    simulation = Simulation(150, seed=1)
    result = simulation.result(0.1)
    intervals = draw(result, draw_subjects(result, 500, 11, 0.95))["all"]
    draws = np.random.default_rng(11).multinomial(150, np.full(150, 1 / 150), size=500)
    drawn: dict[float, list[float]] = {target: [] for target in TARGETS}
    eers = []
    falling = np.argsort(simulation.impostor[0])[::-1]
    thresholds = simulation.impostor[0][falling]
    rising = np.argsort(simulation.genuine[0])
    genuine_below = np.searchsorted(simulation.genuine[0][rising] + 0.1, thresholds)
    for times in draws:
        weights = (times[simulation.first] * times[simulation.second])[falling]
        fmr = np.cumsum(weights) / weights.sum()
        fnmr = np.append(0, np.cumsum(times[simulation.owner][rising]))[genuine_below] / (times.sum() * PER_SUBJECT)
        for target in TARGETS:
            drawn[target].append(fnmr[np.searchsorted(fmr, target, side="right") - 1])
        eers.append(fnmr[np.argmax(fmr >= fnmr)])
    for metric, samples in [(EER, eers), *((MetricId.at("fnmr", target), drawn[target]) for target in TARGETS)]:
        low, high = np.quantile(samples, [0.025, 0.975])
        ends = np.quantile(intervals[metric], [0.025, 0.975])
        np.testing.assert_allclose(ends, (low, high), atol=0.05 * (high - low))


def test_a_mode_does_not_differ_from_itself_and_the_same_draws_make_a_difference_narrow() -> None:
    simulation = Simulation(80, seed=2)
    base, better = simulation.result(0.10), simulation.result(0.14, mode=1)
    nothing = paired_bootstrap(base, base, resamples=200)["all"]
    assert (nothing[EER].value, nothing[EER].low, nothing[EER].high) == (0, 0, 0)
    paired = paired_bootstrap(base, better, resamples=200)["all"][MetricId.at("fnmr", 0.1)]
    alone = [bootstrap(result, resamples=200)["all"][MetricId.at("fnmr", 0.1)] for result in (base, better)]
    assert paired.high < 0 < alone[0].low
    of_independent_draws = np.hypot(*(interval.high - interval.low for interval in alone))
    assert paired.high - paired.low < 0.8 * of_independent_draws
    before, after = (one.overall.verification.at(0.1).fnmr for one in (base, better))
    assert paired.value == after - before
    relative = relative_bootstrap(base, better, resamples=200)["all"][MetricId.at("fnmr", 0.1)]
    assert relative.value == after / before - 1
    samples = [draw(one, draw_subjects(one, 200, 0, 0.95))["all"][MetricId.at("fnmr", 0.1)] for one in (base, better)]
    np.testing.assert_allclose(
        (relative.low, relative.high), np.quantile(samples[1] / samples[0] - 1, (0.025, 0.975)), rtol=1e-12
    )


def test_a_relative_difference_to_no_errors_is_not_estimable_unless_there_are_none_after() -> None:
    subjects = np.repeat(np.arange(12), 5)
    apart = np.eye(12)[subjects] + 1e-3 * np.random.default_rng(0).normal(size=(60, 12))
    mixed = np.random.default_rng(1).normal(size=(60, 12))
    perfect, poor = (all_pairs(x, subjects, fmr_points=(0.1,)) for x in (apart, mixed))
    same = relative_bootstrap(perfect, perfect, resamples=50)["all"][EER]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    worse = relative_bootstrap(perfect, poor, resamples=50)["all"][EER]
    assert (worse.value, worse.low) == (None, None)
    assert worse.reason == "not estimable: no error before"


def test_a_seed_repeats_the_draws_and_another_does_not() -> None:
    result = Simulation(40, seed=3).result(0.1)
    first, again, other = (bootstrap(result, resamples=100, seed=seed)["all"][EER] for seed in (5, 5, 6))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    wide, narrow = (bootstrap(result, resamples=100, level=level)["all"][EER] for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.fixture(scope="module")
def faces() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    subjects = np.arange(600) % 90
    features = random.normal(size=(90, 16))[subjects] + random.normal(size=(600, 16)) * 0.8
    return features, subjects, (np.arange(600) // 90) % 2


@pytest.mark.parametrize("max_clusters", [512, 30])
def test_every_estimable_metric_of_every_cell_gets_an_interval_around_it(
    faces: tuple[np.ndarray, np.ndarray, np.ndarray], max_clusters: int
) -> None:
    features, subjects, classes = faces
    result = all_pairs(features, subjects, classes=classes, class_names=("a", "b"), max_clusters=max_clusters)
    intervals = bootstrap(result, resamples=300)
    assert list(intervals) == ["all", "a-a", "a-b", "b-b"]
    for cell in result:
        found = intervals[cell.name]
        exact_of = {EER: cell.verification.eer.value, AUC: cell.verification.auc}
        exact_of |= {MetricId.at("fnmr", point.target_fmr): point.fnmr for point in cell.verification.points}
        exact_of |= {MetricId.at("fnmr_global", point.target_fmr): point.fnmr for point in cell.at_global}
        exact_of |= {MetricId.at("fmr_global", point.target_fmr): point.fmr for point in cell.at_global}
        assert set(found) == set(exact_of)
        for metric, exact in exact_of.items():
            interval = found[metric]
            assert interval.value == exact
            if exact is None:
                assert interval.low is interval.high is None
            else:
                # The interval's own grid is 2^-10 wide in score.
                assert interval.low - 1e-3 <= exact <= interval.high + 1e-3
        assert found[MetricId.at("fnmr", 1e-6)].low is None


def test_a_cell_without_genuine_pairs_has_no_intervals_but_a_false_match_rate() -> None:
    features = np.random.default_rng(1).normal(size=(60, 8))
    result = all_pairs(features, np.arange(60) // 2, classes=np.arange(60) % 2, class_names=("a", "b"))
    alone = bootstrap(result, resamples=50, seed=1)["a-a"]
    assert result.cells["a-a"].verification.n_genuine == 0
    without = [alone[metric] for metric in (EER, AUC, MetricId("fnmr@1e-1"), MetricId("fnmr_global@1e-1"))]
    assert {(one.value, one.low, one.high) for one in without} == {(None, None, None)}
    assert all(one.reason for one in without)
    false_matches = alone[MetricId("fmr_global@1e-1")]
    assert false_matches.low < false_matches.value < false_matches.high


def test_drawn_rates_stay_between_0_and_1(faces: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    rows, subjects, _ = faces
    result = all_pairs(rows, subjects)
    drawn = draw(result, draw_subjects(result, 500, 0, 0.95))
    for samples in drawn["all"].values():
        assert not ((samples < 0) | (samples > 1)).any()


def test_results_of_other_rows_are_not_compared(faces: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    features, subjects, classes = faces
    result = all_pairs(features, subjects)
    for other in (
        all_pairs(features, np.roll(subjects, 1)),
        all_pairs(features, subjects, duplicates=np.arange(600) // 2),
        all_pairs(features, subjects, classes=classes, class_names=("a", "b")),
        all_pairs(features, subjects, fmr_points=(0.1,)),
    ):
        with pytest.raises(ValueError, match="not of the same rows"):
            paired_bootstrap(result, other)


def test_what_cannot_be_drawn_is_refused(faces: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    features, subjects, _ = faces
    with pytest.raises(ValueError, match=r"1 subject\(s\)"):
        bootstrap(all_pairs(features[:5], np.zeros(5, dtype=int)))
    result = all_pairs(features, subjects)
    with pytest.raises(ValueError, match="resamples = 0"):
        bootstrap(result, resamples=0)
    with pytest.raises(ValueError, match="level = 95"):
        bootstrap(result, level=95)
