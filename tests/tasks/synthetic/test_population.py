"""Synthetic embeddings behave like measured ones, and hold something that can be learned for people never seen."""

import numpy as np
import pytest

from tasks.synthetic.population import SyntheticPopulation

FRONTAL = np.tile(np.arange(14) < 10, 500)
SUBJECT = np.repeat(np.arange(500), 14)


def photographs(dim, population=0, seed=0, subjects=500):
    """Embeddings `[14 · subjects, dim]` and yaws, 10 frontal and 4 profile photographs of each."""
    common = SyntheticPopulation.draw(dim, population)
    taken = common.photograph([np.random.default_rng([seed, subject]) for subject in range(subjects)], 10, 4)
    return taken.embedding, taken.yaw


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def equal_error_rate(vectors, left, right, subject=SUBJECT):
    """Return the EER in percent between the rows in mask `left` and those in `right`, by sorting all scores."""
    scores = unit(vectors[left]) @ unit(vectors[right]).T
    same = subject[left][:, None] == subject[right]
    apart = np.flatnonzero(left)[:, None] < np.flatnonzero(right) if (left == right).all() else np.ones_like(same)
    genuine, impostor = np.sort(scores[same & apart]), np.sort(scores[~same & apart])
    false_match = 1 - np.searchsorted(impostor, genuine) / len(impostor)
    false_non_match = np.arange(len(genuine)) / len(genuine)
    at = np.argmin(np.abs(false_match - false_non_match))
    return 50 * (false_match[at] + false_non_match[at])


def whitening(vectors, subject):
    """Within-class covariance normalisation, shrunk by a tenth: the plainest thing that can be learned."""
    codes = np.unique(subject, return_inverse=True)[1]
    means = np.zeros((codes.max() + 1, vectors.shape[1]))
    np.add.at(means, codes, unit(vectors))
    means /= np.bincount(codes)[:, None]
    within = np.cov((unit(vectors) - means[codes]).T)
    values, directions = np.linalg.eigh(0.9 * within + 0.1 * np.trace(within) / len(within) * np.eye(len(within)))
    return (directions / np.sqrt(values)) @ directions.T


@pytest.fixture(scope="module")
def at_512():
    return photographs(512)


@pytest.mark.parametrize(
    ("left", "right", "least", "most"),
    [(FRONTAL, FRONTAL, 0.7, 1.4), (FRONTAL, ~FRONTAL, 10, 13), (~FRONTAL, ~FRONTAL, 13, 19)],
    ids=["frontal-frontal", "frontal-profile", "profile-profile"],
)
def test_raw_error_rates_are_near_the_measured_ones(at_512, left, right, least, most):
    assert least < equal_error_rate(at_512[0], left, right) < most


@pytest.mark.parametrize("dim", [128, 192])
def test_shorter_embeddings_are_sensible_too(dim):
    vectors, _ = photographs(dim)
    assert equal_error_rate(vectors, FRONTAL, FRONTAL) < 3
    assert 7 < equal_error_rate(vectors, FRONTAL, ~FRONTAL) < 16


def test_lengths_and_angles_are_near_the_measured_ones(at_512):
    vectors, yaw = at_512
    lengths = np.linalg.norm(vectors, axis=1)
    assert 3.3 < np.median(lengths[FRONTAL]) < 3.7
    assert 2.1 < np.median(lengths[~FRONTAL]) < 2.6
    assert lengths.min() > 1
    assert np.abs(yaw[FRONTAL]).max() <= 15
    assert np.abs(yaw[~FRONTAL]).min() >= 25
    assert 53 < np.median(np.abs(yaw[~FRONTAL])) < 57
    assert 0.45 < (yaw[~FRONTAL] < 0).mean() < 0.55


def test_numbers_are_signed_and_none_stands_out(at_512):
    vectors = unit(at_512[0])
    assert 0.4 < (vectors > 0).mean() < 0.6
    assert vectors.var(axis=0).max() < 6 * vectors.var(axis=0).mean()


@pytest.mark.parametrize("dim", [512, 192])
def test_what_350_subjects_teach_helps_150_others(dim):
    vectors, _ = photographs(dim)
    learned = whitening(vectors[SUBJECT < 350], SUBJECT[SUBJECT < 350])
    others = SUBJECT >= 350
    front, side = others & FRONTAL, others & ~FRONTAL
    before, after = equal_error_rate(vectors, front, side), equal_error_rate(vectors @ learned, front, side)
    assert after < 0.8 * before
    assert equal_error_rate(vectors @ learned, front, front) < 1.1 * equal_error_rate(vectors, front, front)


def test_what_one_population_teaches_does_not_help_in_another(at_512):
    learned = whitening(at_512[0], SUBJECT)
    elsewhere, _ = photographs(512, population=1)
    before = equal_error_rate(elsewhere, FRONTAL, ~FRONTAL)
    assert equal_error_rate(elsewhere @ learned, FRONTAL, ~FRONTAL) > 0.97 * before


@pytest.mark.parametrize("dim", [2, 3, 17])
def test_very_short_embeddings_can_be_drawn(dim):
    vectors, _ = photographs(dim, subjects=3)
    assert vectors.shape == (42, dim)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()


@pytest.mark.parametrize(("frontal", "profile"), [(3, 2), (1, 0), (0, 1)])
def test_a_subject_depends_on_its_own_numbers_alone(frontal, profile):
    common = SyntheticPopulation.draw(64, 5)
    together = common.photograph([np.random.default_rng(seed) for seed in range(30)], frontal, profile)
    alone = [common.photograph([np.random.default_rng(seed)], frontal, profile) for seed in range(30)]
    for name in ("yaw", "pitch", "embedding"):
        each = np.concatenate([getattr(one, name) for one in alone])
        np.testing.assert_array_equal(getattr(together, name), each)
    assert np.unique(together.embedding, axis=0).shape == (30 * (frontal + profile), 64)
