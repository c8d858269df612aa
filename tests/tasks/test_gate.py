"""The gate: a worse model is kept back, an equal one passes, a first release is judged against raw."""

import pytest

from schemas.reports import ALL, RAW, CellResult, Estimate, Evaluation, ModeResult, Population
from schemas.settings import GateSettings
from tasks.evaluate import HELD_OUT
from tasks.gate import decide, gated

FP = "frontal-profile"
NONE = Estimate(value=None, reason="not estimable: test")


def cell(eer: float | None, pairs: int = 100) -> CellResult:
    estimate = NONE if eer is None else Estimate(value=eer, low=eer - 0.01, high=eer + 0.01)
    return CellResult(
        n_genuine=pairs,
        n_impostor=pairs,
        eer=estimate,
        auc=NONE,
        d_prime=None,
        fnmr={"1e-3": estimate},
        fnmr_global={},
        fmr_global={},
    )


def mode(
    name: str, eer: float | None, difference: Estimate | None = None, before: Estimate | None = None, pairs: int = 100
) -> ModeResult:
    both = lambda one: {} if one is None else {where: {"eer": one, "fnmr@1e-3": one} for where in (FP, ALL)}  # noqa: E731
    return ModeResult(
        mode=name,
        model_digest=None if name == RAW else name,
        thresholds={},
        cells={ALL: cell(eer), FP: cell(eer, pairs)},
        difference=both(difference),
        versus_served=both(before),
    )


def evaluation(*modes: ModeResult) -> Evaluation:
    populations = {}
    if modes:
        populations[HELD_OUT] = Population(
            name=HELD_OUT,
            n_rows=10,
            n_subjects=5,
            left_out_subjects=0,
            left_out_rows=0,
            modes={one.mode: one for one in modes},
        )
    return Evaluation(
        release="r", resamples=100, seed=0, fmrs=["1e-3"], unlabelled_rows=0, duplicate_rows=0, populations=populations
    )


def difference(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high)


RAW_MODE = mode(RAW, 0.11)


def test_first_release_is_judged_against_raw() -> None:
    better = decide(
        evaluation(RAW_MODE, mode("per_sample", 0.09, difference(-0.02, -0.03, -0.01))), GateSettings(), None
    )
    assert better.promoted
    assert better.compared_with == RAW
    assert "9.00%" in better.reason
    assert "−3.00 to −1.00" in better.reason
    worse = decide(evaluation(RAW_MODE, mode("per_sample", 0.13, difference(0.02, 0.01, 0.03))), GateSettings(), None)
    assert not worse.promoted
    assert "per_sample" in worse.reason
    assert "+2.00 points to raw (95% interval +1.00 to +3.00)" in worse.reason


def test_worse_than_served_is_kept_back_though_better_than_raw() -> None:
    model = mode("per_sample", 0.10, difference(-0.01, -0.02, -0.005), before=difference(0.01, 0.004, 0.02))
    decision = decide(evaluation(RAW_MODE, model), GateSettings(), "r00001-aa")
    assert not decision.promoted
    assert decision.compared_with == "r00001-aa"


def test_worse_than_raw_does_not_matter_when_no_worse_than_served() -> None:
    model = mode("per_sample", 0.12, difference(0.01, 0.005, 0.02), before=difference(0.0, 0.0, 0.0))
    assert decide(evaluation(RAW_MODE, model), GateSettings(), "r00001-aa").promoted


def test_served_without_comparison_falls_back_to_raw() -> None:
    decision = decide(
        evaluation(RAW_MODE, mode("per_sample", 0.13, difference(0.02, 0.01, 0.03))), GateSettings(), "r1"
    )
    assert not decision.promoted
    assert decision.compared_with == RAW


@pytest.mark.parametrize(
    ("low", "tolerance", "promoted"),
    [(0.0, 0.0, True), (1e-9, 0.0, False), (0.005, 0.005, True), (0.0051, 0.005, False), (-0.01, 0.0, True)],
)
def test_only_an_interval_above_the_tolerance_keeps_back(low: float, tolerance: float, promoted: bool) -> None:
    model = mode("per_sample", 0.12, difference(0.01, low, 0.02))
    assert decide(evaluation(RAW_MODE, model), GateSettings(tolerance=tolerance), None).promoted is promoted


def test_one_bad_mode_keeps_all_back() -> None:
    good = mode("per_sample", 0.09, difference(-0.02, -0.03, -0.01))
    bad = mode("batch_stat", 0.15, difference(0.04, 0.03, 0.05))
    decision = decide(evaluation(RAW_MODE, good, bad), GateSettings(), None)
    assert not decision.promoted
    assert "batch_stat" in decision.reason


def test_without_interval_the_value_decides() -> None:
    model = mode("per_sample", 0.12, Estimate(value=0.01))
    assert not decide(evaluation(RAW_MODE, model), GateSettings(), None).promoted


def test_nothing_measured_promotes_and_says_so() -> None:
    decision = decide(evaluation(), GateSettings(), None)
    assert decision.promoted
    assert "without a measurement" in decision.reason
    assert gated(evaluation(), GateSettings()).figures == {}


def test_not_estimable_is_said() -> None:
    decision = decide(evaluation(mode(RAW, None), mode("per_sample", None, NONE)), GateSettings(), None)
    assert decision.promoted
    assert "not estimable" in decision.reason


def test_empty_cell_falls_back_to_all_pairs() -> None:
    no_pose = evaluation(mode(RAW, 0.11, pairs=0), mode("per_sample", 0.09, difference(-0.02, -0.03, -0.01), pairs=0))
    assert gated(no_pose, GateSettings()).metric.cell == ALL
    assert decide(no_pose, GateSettings(), None).promoted


def test_other_metrics_can_be_gated() -> None:
    settings = GateSettings(metric="fnmr@1e-3")
    model = mode("per_sample", 0.13, difference(0.02, 0.01, 0.03))
    assert gated(evaluation(RAW_MODE, model), settings).name == "frontal–profile FNMR at own FMR 0.1%"
    assert not decide(evaluation(RAW_MODE, model), settings, None).promoted
