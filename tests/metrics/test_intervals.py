"""Percentile intervals by hand, and where there are none."""

import numpy as np
import pytest
from scipy.special import logit
from scipy.stats import t

from metrics.intervals import with_interval, with_logit_interval
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


def test_a_rate_has_an_interval_around_its_logit_within_0_and_1() -> None:
    draws = np.random.default_rng(0).beta(2, 40, 2000)
    found = with_logit_interval(Estimate(value=0.04), draws, 0.95, 20)
    assert logit([found.low, found.high]) - logit(0.04) == pytest.approx(
        np.array([-1, 1]) * t.ppf(0.975, 19) * logit(draws).std(), rel=1e-9
    )
    none = with_logit_interval(Estimate(value=0.0), DRAWS, 0.5, 20)
    assert (none.low, none.high) == (0.25, 0.75)
    with_zeros = with_logit_interval(Estimate(value=0.01), np.append(np.zeros(50), draws), 0.95, 20)
    assert 0 < with_zeros.low < 0.01 < with_zeros.high < 1
