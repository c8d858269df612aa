"""Intervals from the draws of a bootstrap. What is drawn is left to `bootstrap` and `identification`."""

import numpy as np
from numpy.typing import NDArray

from schemas.reports import Estimate

_ENOUGH = 0.95  # share of the draws in which a metric must exist; else there is no interval


def with_interval(exact: Estimate, samples: NDArray[np.float64], level: float) -> Estimate:
    """Return an estimate with its percentile interval: the quantiles (1 - level) / 2 and (1 + level) / 2 of the draws.

    There is no interval where the value is None, or where more than 5% of the draws are not finite.

    Args:
        exact: the value on the data itself.
        samples: its value in every draw, float64 `[resamples]`, NaN where a draw does not have it.
        level: such as 0.95.

    >>> with_interval(Estimate(value=0.5), np.linspace(0, 1, 1001), 0.5)
    Estimate(value=0.5, low=0.25, high=0.75, reason=None)
    """
    known = samples[np.isfinite(samples)]
    if exact.value is None or len(known) < _ENOUGH * len(samples):
        return exact
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value=exact.value, low=float(low), high=float(high))


def with_logit_interval(exact: Estimate, samples: NDArray[np.float64], level: float, subjects: int) -> Estimate:
    """Return a rate with the interval logit(rate) ± t · sd(logit of the draws), t of n - 1 degrees of freedom.

    It stays within (0, 1), and reaches farther on the side where the rate has room: with few subjects, percentile
    intervals of small rates are too low. A rate of 0 or 1 has the percentile interval. There is no interval where
    `with_interval` has none. Draws of 0 or 1 count as half of the smallest distance from them.

    Args:
        exact: the rate on the data itself.
        samples: its value in every draw, float64 `[resamples]`, NaN where a draw does not have it.
        level: such as 0.95.
        subjects: from how many the draws are.

    >>> found = with_logit_interval(Estimate(value=0.1), np.random.default_rng(0).normal(0.1, 0.02, 1000), 0.95, 50)
    >>> round(found.low, 3), round(found.high, 3)
    (0.065, 0.151)
    """
    from scipy.special import expit, logit, stdtrit  # loaded for this only

    by_percentile = with_interval(exact, samples, level)
    if by_percentile.low is None or exact.value is None or not 0 < exact.value < 1 or subjects < 2:
        return by_percentile
    known = np.append(samples[np.isfinite(samples)], exact.value)
    room = np.minimum(known, 1 - known)
    known = np.clip(known, room[room > 0].min() / 2, 1 - room[room > 0].min() / 2)
    half = float(stdtrit(subjects - 1, (1 + level) / 2)) * float(np.std(logit(known[:-1])))
    low, high = expit(logit(exact.value) + np.array([-half, half]))
    return Estimate(value=exact.value, low=float(low), high=float(high))
