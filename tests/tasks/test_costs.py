import numpy as np
import pytest

from tasks.costs import SAMPLE_SECONDS, Costs, resident_bytes


def test_a_stage_knows_its_time_rows_and_the_memory_that_was_used_meanwhile() -> None:
    with Costs() as costs:
        with costs.stage("first") as stage:
            stage.rows = 50
            held = np.ones(25_000_000)  # 200 MB, given back before the stage ends
            stage_memory = resident_bytes()
            while costs._open[0].peak < stage_memory - 50_000_000:
                held.sum()
            del held
        with costs.stage("second"):
            pass
    first, second = costs.stages
    assert (first.stage, first.rows, second.stage, second.rows) == ("first", 50, "second", None)
    assert first.cpu_seconds > 0
    assert first.rows_per_second == pytest.approx(50 / first.seconds)
    assert second.rows_per_second is None
    assert first.peak_megabytes > second.peak_megabytes + 100
    assert not costs._sampler.is_alive()
    assert SAMPLE_SECONDS < 1


def test_a_stage_that_fails_is_not_recorded() -> None:
    with Costs() as costs, pytest.raises(ValueError, match="no"), costs.stage("failed"):
        raise ValueError("no")
    assert costs.stages == []
    assert costs._open == []
