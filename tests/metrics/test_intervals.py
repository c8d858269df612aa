"""Percentile intervals by hand, and where there are none."""

import numpy as np

from metrics.intervals import with_interval
from schemas.reports import Estimate

DRAWS = np.arange(101) / 100


def test_ends_are_quantiles_of_the_draws() -> None:
    assert with_interval(Estimate(value=0.4), DRAWS, 0.5) == Estimate(value=0.4, low=0.25, high=0.75)


def test_up_to_a_twentieth_of_the_draws_may_lack_the_metric() -> None:
    some, more = np.append(DRAWS, [np.nan] * 5), np.append(DRAWS, [np.nan] * 6)
    assert with_interval(Estimate(value=0.4), some, 0.5).low == 0.25
    assert with_interval(Estimate(value=0.4), more, 0.5) == Estimate(value=0.4)


def test_what_is_not_estimable_keeps_its_reason() -> None:
    missing = Estimate(value=None, reason="no genuine pair")
    assert with_interval(missing, DRAWS, 0.5) is missing
