"""Tests and bounds from intervals, against SciPy's normal distribution and examples worked by hand."""

import numpy as np
import pytest
from scipy.stats import norm

from metrics.significance import holm, p_worse, subjects_needed, upper_bound
from schemas.reports import Estimate


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high)


@pytest.mark.parametrize("tolerance", [0.0, 0.004])
@pytest.mark.parametrize("value", [-0.01, 0.0, 0.01, 0.03])
def test_p_values_and_bounds_are_those_of_a_normal_with_the_halves_of_the_interval(
    value: float, tolerance: float
) -> None:
    low, high = value - 0.02, value + 0.03
    found = estimate(value, low, high)
    assert p_worse(found, tolerance) == pytest.approx(norm.sf(value, tolerance, 0.02 / norm.ppf(0.975)), abs=1e-12)
    assert upper_bound(found) == pytest.approx(norm.ppf(0.95, value, 0.03 / norm.ppf(0.975)), abs=1e-12)
    assert (p_worse(found, tolerance) < 0.025) == (low > tolerance)


def test_without_an_interval_the_value_decides() -> None:
    for one in (Estimate(value=0.01), estimate(0.01, 0.01, 0.01)):
        assert (p_worse(one), p_worse(one, 0.01), upper_bound(one)) == (0.0, 1.0, 0.01)
        assert subjects_needed(5, one, 0.02) == 0


def test_holm_by_hand_and_never_stricter_than_bonferroni() -> None:
    assert holm([], 0.025) == []
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]  # 0.005 < 1/80, 0.01 < 1/60, 0.03 > 1/40
    rng = np.random.default_rng(0)
    for _ in range(100):
        p = rng.uniform(size=5) ** 4
        rejected = np.array(holm(p.tolist(), 0.05))
        assert (rejected >= (p <= 0.01)).all()
        assert rejected.any() == (p <= 0.01).any()


def test_on_the_number_of_subjects_needed_an_equal_model_passes_95_times_of_100() -> None:
    """Differences of an equal model on n subjects have a standard error of 1/√n."""
    rng = np.random.default_rng(0)
    error = 1 / np.sqrt(50)
    needed = subjects_needed(50, estimate(0.0, -1.96 * error, 1.96 * error), 0.2)
    assert needed is not None
    drawn = rng.normal(0, 1 / np.sqrt(needed), 20_000)
    passed = [upper_bound(estimate(one, one - 1, one + norm.ppf(0.975) / np.sqrt(needed))) < 0.2 for one in drawn]
    assert np.mean(passed) == pytest.approx(0.95, abs=0.005)
    assert subjects_needed(50, estimate(0.0, -0.1, 0.1), 0.0) is None
