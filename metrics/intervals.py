"""Percentile intervals from the draws of a bootstrap. What is drawn is left to `bootstrap` and `identification`."""

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
