"""Decisions about differences of error rates: worse, not inferior, or too few subjects to say.

All rest on a difference with its paired 95% interval. Each half of the interval is taken as 1.96 standard errors of a
normal distribution, the lower half for "worse", the upper half for an upper bound. What is compared with what, and what
follows, is left to `tasks.gate`.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

from schemas.reports import Estimate

LEVEL = 0.025  # one-sided, of a family: with a single comparison that is a 95% interval wholly above the tolerance
BOUND = 0.95  # of a one-sided bound
POWER = 0.95  # with `subjects_needed`, an equal model is found not inferior this often
_NORMAL = NormalDist()
_HALF = _NORMAL.inv_cdf(0.975)
_ONE_SIDED = _NORMAL.inv_cdf(BOUND)


def p_worse(difference: Estimate, tolerance: float = 0.0) -> float:
    """Return the one-sided p-value of "the difference is at most `tolerance`"; small where it is worse than that.

    Without an interval, or with one of no width, the value decides: 0 or 1.

    >>> round(p_worse(Estimate(value=0.0196, low=0.0, high=0.05)), 3)
    0.025
    """
    assert difference.value is not None
    excess = difference.value - tolerance
    error = _standard_error(difference, difference.low)
    if error == 0:
        return 0.0 if excess > 0 else 1.0
    return 1 - _NORMAL.cdf(excess / error)


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Return which hypotheses are rejected with a family-wise error rate of at most `level`.

    The smallest of m p-values is compared with level/m, the next with level/(m-1), and so on until one is not below
    (Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979). It holds for
    dependent tests, as these are.

    >>> holm([0.02, 0.011, 0.03], 0.025)
    [False, False, False]
    >>> holm([0.012, 0.001, 0.03], 0.025)
    [True, True, False]
    """
    rejected = [False] * len(p_values)
    for done, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[at] > level / (len(p_values) - done):
            break
        rejected[at] = True
    return rejected


def upper_bound(difference: Estimate) -> float:
    """Return the one-sided 95% upper bound of a difference; the value where it has no interval.

    >>> round(upper_bound(Estimate(value=0.0, low=-0.02, high=0.0196)), 4)
    0.0164
    """
    assert difference.value is not None
    return difference.value + _ONE_SIDED * _standard_error(difference, difference.high)


def subjects_needed(subjects: int, difference: Estimate, limit: float) -> int | None:
    """Return on how many subjects an equal model would be found within `limit`, 95 times of 100.

        N = n · (standard error · (z_bound + z_power) / limit)²

    The standard error is that of the difference on n subjects, and falls as 1/√n. None where no number is enough, since
    the limit is 0.

    Args:
        subjects: on how many the difference rests.
        difference: with its interval.
        limit: the largest upper bound that passes, in the units of the difference.

    >>> subjects_needed(100, Estimate(value=0.0, low=-0.0196, high=0.0196), 0.0329)
    100
    """
    error = _standard_error(difference, difference.high)
    if error == 0:
        return 0
    if limit <= 0:
        return None
    return math.ceil(subjects * (error * (_ONE_SIDED + _NORMAL.inv_cdf(POWER)) / limit) ** 2 - 1e-9)


def _standard_error(difference: Estimate, end: float | None) -> float:
    if end is None or difference.value is None:
        return 0.0
    return abs(end - difference.value) / _HALF
