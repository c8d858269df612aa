"""The gate: a worse model is rejected, an equal one passes, and nothing passes for want of a measurement."""

import pytest

from schemas.metrics import ALL, HELD_OUT, RAW
from schemas.releases import Release
from schemas.reports import CellResult, Estimate, Evaluation, GateDecision, GuardedResult, ModeResult, Population
from schemas.settings import GateSettings, Guard
from tasks.gate import decide, gated

FF, FP = "frontal-frontal", "frontal-profile"
METRICS = ("eer", "fnmr@1e-3", "fnmr_global@1e-3")
NONE = Estimate(value=None, reason="not estimable: test")
ONE = GateSettings(guards=())


def cell(eer: float | None, pairs: int = 100) -> CellResult:
    estimate = NONE if eer is None else Estimate(value=eer, low=eer - 0.01, high=eer + 0.01)
    return CellResult(
        n_genuine=pairs,
        n_impostor=pairs,
        eer=estimate,
        auc=NONE,
        d_prime=None,
        fnmr={"1e-3": estimate},
        fnmr_global={"1e-3": estimate},
        fmr_global={},
    )


def mode(
    name: str,
    eer: float | None,
    difference: Estimate | None = None,
    before: Estimate | None = None,
    *,
    empty: tuple[str, ...] = (),
    frontal: Estimate | None = None,
    training_subjects_known: bool = True,
) -> ModeResult:
    """All cells alike, but for those that are `empty`, and for the difference of frontal–frontal pairs."""

    def everywhere(one: Estimate | None) -> dict[str, dict[str, Estimate]]:
        if one is None:
            return {}
        return {where: dict.fromkeys(METRICS, frontal or one if where == FF else one) for where in (ALL, FF, FP)}

    return ModeResult(
        mode=name,
        model_digest=None if name == RAW else name,
        training_subjects_known=training_subjects_known,
        thresholds={},
        cells={where: cell(eer, 0 if where in empty else 100) for where in (ALL, FF, FP)},
        difference=everywhere(difference),
        versus_served=everywhere(before),
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


def served(eer: float | None, *modes: str, judged: tuple[GuardedResult, ...] = ()) -> Release:
    """A release that is served, with or without a measurement of its modes."""
    figures = {one: cell(eer).eer for one in (RAW, *modes)} if eer is not None else {}
    decision = GateDecision(promoted=True, reason="", judged=list(judged))
    return Release.model_construct(
        release="r00001-aa", models=dict.fromkeys(modes or ("per_sample",)), gated=figures, gate=decision
    )


def difference(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high)


RAW_MODE = mode(RAW, 0.11)


def test_first_release_is_compared_with_raw() -> None:
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
    assert "+2.00 points against raw (95% interval +1.00 to +3.00)" in worse.reason


def test_worse_than_served_is_rejected_though_better_than_raw() -> None:
    model = mode("per_sample", 0.10, difference(-0.01, -0.02, -0.005), before=difference(0.01, 0.004, 0.02))
    decision = decide(evaluation(RAW_MODE, model), GateSettings(), served(0.1, "per_sample"))
    assert not decision.promoted
    assert decision.compared_with == "r00001-aa"


def test_worse_than_raw_does_not_matter_when_no_worse_than_served() -> None:
    model = mode("per_sample", 0.12, difference(0.01, 0.005, 0.02), before=difference(0.0, 0.0, 0.0))
    assert decide(evaluation(RAW_MODE, model), GateSettings(), served(0.1, "per_sample")).promoted


@pytest.mark.parametrize(
    ("low", "tolerance", "promoted"),
    [(0.0, 0.0, True), (1e-9, 0.0, False), (0.005, 0.005, True), (0.0051, 0.005, False), (-0.01, 0.0, True)],
)
def test_only_an_interval_above_the_tolerance_rejects(low: float, tolerance: float, promoted: bool) -> None:
    model = mode("per_sample", 0.12, difference(0.01, low, 0.02))
    assert decide(evaluation(RAW_MODE, model), GateSettings(tolerance=tolerance), None).promoted is promoted


def test_one_bad_mode_rejects_the_release() -> None:
    good = mode("per_sample", 0.09, difference(-0.02, -0.03, -0.01))
    bad = mode("batch_stat", 0.15, difference(0.04, 0.03, 0.05))
    decision = decide(evaluation(RAW_MODE, good, bad), GateSettings(), None)
    assert not decision.promoted
    assert "batch_stat" in decision.reason


def test_without_interval_the_value_decides() -> None:
    model = mode("per_sample", 0.12, Estimate(value=0.01))
    assert not decide(evaluation(RAW_MODE, model), GateSettings(), None).promoted


BETTER = difference(-0.02, -0.03, -0.01)
PROMOTE = GateSettings(unmeasured="promote")


def test_first_release_and_one_after_an_unmeasured_one_pass_without_a_measurement_and_say_so() -> None:
    for before in (None, served(None, "per_sample")):
        decision = decide(evaluation(), GateSettings(), before)
        assert decision.promoted
        assert decision.reason.startswith("without a measurement: there are fewer than two labelled held-out subjects")
        assert decision.compared_with is None
    assert gated(evaluation(), GateSettings()).values == {}


def test_what_was_measured_is_not_replaced_by_what_was_not() -> None:
    decision = decide(evaluation(), GateSettings(), served(0.1, "per_sample"))
    assert not decision.promoted
    assert decision.reason == (
        "it cannot be compared with r00001-aa, which is served and was measured: there are fewer than two labelled "
        "held-out subjects; fix the labels or the model, or set [gate] unmeasured = 'promote'"
    )
    forced = decide(evaluation(), PROMOTE, served(0.1, "per_sample"))
    assert forced.promoted
    assert "without a measurement" in forced.reason


def test_better_than_raw_is_no_comparison_with_what_is_served() -> None:
    found = evaluation(RAW_MODE, mode("per_sample", 0.09, BETTER))
    decision = decide(found, GateSettings(), served(0.05, "per_sample"))
    assert not decision.promoted
    assert "frontal–profile EER: the two releases have too few held-out subjects in common" in decision.reason
    assert decision.compared_with is None
    assert {(one.reference, one.outcome) for one in decision.judged} == {(None, "not compared")}
    for settings, before in ((PROMOTE, served(0.05, "per_sample")), (GateSettings(), served(None, "per_sample"))):
        fallen_back = decide(found, settings, before)
        assert (fallen_back.promoted, fallen_back.compared_with) == (True, RAW)
    worse = evaluation(RAW_MODE, mode("per_sample", 0.13, difference(0.02, 0.01, 0.03)))
    assert not decide(worse, PROMOTE, served(0.05, "per_sample")).promoted


def test_mode_that_is_not_served_yet_is_compared_with_raw_and_each_reference_is_recorded() -> None:
    old = mode("per_sample", 0.09, BETTER, before=difference(0.0, 0.0, 0.0))
    new = mode("batch_stat", 0.09, BETTER)
    decision = decide(evaluation(RAW_MODE, old, new), GateSettings(), served(0.1, "per_sample"))
    assert decision.promoted
    assert {(one.mode, one.reference) for one in decision.judged} == {("per_sample", "r00001-aa"), ("batch_stat", RAW)}
    assert decision.compared_with is None
    assert "0 points against r00001-aa" in decision.reason
    assert "−2.00 points against raw" in decision.reason


def test_mode_whose_training_subjects_are_unknown_is_not_measured() -> None:
    silent = evaluation(RAW_MODE, mode("per_sample", 0.01, BETTER, before=BETTER, training_subjects_known=False))
    assert set(gated(silent, GateSettings()).values) == {RAW}
    first = decide(silent, GateSettings(), None)
    assert first.promoted
    assert first.reason == (
        "without a measurement: per_sample: leakage cannot be excluded, since its training subjects are unknown"
    )
    later = decide(silent, GateSettings(), served(0.1, "per_sample"))
    assert not later.promoted
    assert "per_sample: leakage cannot be excluded, since its training subjects are unknown; fix" in later.reason
    assert decide(silent, GateSettings(), served(None, "per_sample")).promoted


def test_not_estimable_is_a_reason_of_a_first_release_and_rejected_later() -> None:
    found = evaluation(mode(RAW, None), mode("per_sample", None, NONE))
    decision = decide(found, GateSettings(), None)
    assert decision.promoted
    assert "frontal–profile EER is not estimable" in decision.reason
    assert not decide(found, GateSettings(), served(0.1, "per_sample")).promoted


def test_metric_that_never_could_be_estimated_does_not_block() -> None:
    settings = GateSettings(guards=(Guard(cell=FP, metric="fnmr@1e-3"),))
    model = mode("per_sample", 0.09, BETTER, before=BETTER)
    for where in (model.difference, model.versus_served):
        where[FP]["fnmr@1e-3"] = NONE
    model.cells[FP].fnmr["1e-3"] = NONE
    first = decide(evaluation(RAW_MODE, model), settings, None)
    before = served(0.1, "per_sample", judged=tuple(first.judged))
    second = decide(evaluation(RAW_MODE, model), settings, before)
    assert second.promoted
    assert "frontal–profile FNMR at own FMR 0.1% is not estimable" in second.reason
    measured = [one.model_copy(update={"value": 0.1}) for one in first.judged]
    assert not decide(evaluation(RAW_MODE, model), settings, served(0.1, "per_sample", judged=tuple(measured))).promoted


def test_harm_to_frontal_pairs_rejects_what_helps_profiles() -> None:
    harmful = mode("per_sample", 0.05, BETTER, frontal=difference(0.39, 0.3, 0.5))
    decision = decide(evaluation(RAW_MODE, harmful), GateSettings(), None)
    assert not decision.promoted
    assert decision.reason == (
        "per_sample: frontal–frontal EER 5.00%, +39.00 points against raw (95% interval +30.00 to +50.00), "
        "significantly worse than the tolerance of 0.2 points; on 5 held-out subjects"
    )
    assert decide(evaluation(RAW_MODE, harmful), ONE, None).promoted


def test_guards_tolerate_noise_and_are_named() -> None:
    noisy = mode("per_sample", 0.05, BETTER, frontal=difference(0.004, 0.0019, 0.01))
    decision = decide(evaluation(RAW_MODE, noisy), GateSettings(), None)
    assert decision.promoted
    assert decision.reason.endswith(
        "; not significantly worse (95% paired bootstrap) in frontal–frontal EER or all pairs EER; "
        "on 5 held-out subjects"
    )
    assert decision.sentence == f"promoted: {decision.reason}"
    assert [one.outcome for one in decision.judged] == ["not worse"] * 3
    assert not decide(evaluation(RAW_MODE, noisy), GateSettings(guards=(Guard(cell=FF, tolerance=0.0),)), None).promoted


def test_tolerance_of_the_gate_is_tolerated_by_the_default_guards() -> None:
    harmful = mode("per_sample", 0.05, BETTER, frontal=difference(0.39, 0.3, 0.5))
    assert decide(evaluation(RAW_MODE, harmful), GateSettings(tolerance=1.0), None).promoted


def test_empty_cell_falls_back_to_all_pairs_and_that_is_said() -> None:
    no_pose = evaluation(mode(RAW, 0.11, empty=(FF, FP)), mode("per_sample", 0.09, BETTER, empty=(FF, FP)))
    assert gated(no_pose, GateSettings()).metric.cell == ALL
    decision = decide(no_pose, GateSettings(), None)
    assert decision.promoted
    assert len(decision.judged) == 1
    assert decision.reason.endswith(
        "there are no frontal–profile or frontal–frontal pairs, so all pairs are compared instead"
    )


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("fnmr@1e-3", "frontal–profile FNMR at own FMR 0.1%"),
        ("fnmr_global@1e-3", "frontal–profile FNMR at global FMR 0.1%"),
    ],
)
def test_other_metrics_can_be_gated(metric: str, name: str) -> None:
    settings = GateSettings(metric=metric)
    model = mode("per_sample", 0.13, difference(0.02, 0.01, 0.03))
    assert gated(evaluation(RAW_MODE, model), settings).name == name
    assert not decide(evaluation(RAW_MODE, model), settings, None).promoted
