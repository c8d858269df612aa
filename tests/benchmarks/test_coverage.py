"""A smaller run of the simulation: intervals hold the truth about as often as they say."""

import numpy as np
import torch

from benchmarks.coverage import METRICS, WHAT, coverage, truth


def test_intervals_of_forty_subjects_hold_the_truth() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    known = truth(populations=1, subjects=400)
    found, effective = coverage(known, 40, balanced=True, experiments=10)
    torch.set_num_threads(threads)
    assert effective == 40
    assert set(found) == {(what, metric) for what in WHAT for metric in METRICS}
    for what in WHAT:
        # Of 20 intervals for EER and FNMR@1e-2, at 95% fewer than 15 hold the truth in less than one case of 1,000.
        assert np.mean([found[what, metric].covered for metric in METRICS[:2]]) >= 0.75
