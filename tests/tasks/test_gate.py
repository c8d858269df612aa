"""The gate: a worse model is rejected, an equal one passes, and nothing passes for want of a measurement."""

import pytest

from schemas.metrics import ALL, HELD_OUT, RAW
from schemas.releases import ModelRef, Release
from schemas.reports import CellResult, Estimate, Evaluation, GateDecision, GuardedResult, ModeResult, Population
from schemas.settings import GateSettings, Guard
from tasks.gate import decide, gated

FF, FP = "frontal-frontal", "frontal-profile"
METRICS = ("eer", "fnmr@1e-3", "fnmr_global@1e-3", "fnmr_global@1e-2")
NONE = Estimate(value=None, reason="not estimable: test")
ONE = GateSettings(guards=())
SAME = Estimate(value=0.0, low=0.0, high=0.0)


def cell(eer: float | None, pairs: int = 100_000) -> CellResult:
    estimate = NONE if eer is None else Estimate(value=eer, low=eer - 0.01, high=eer + 0.01)
    return CellResult(
        n_genuine=pairs,
        n_impostor=pairs,
        eer=estimate,
        auc=NONE,
        d_prime=None,
        fnmr={"1e-3": estimate},
        fnmr_global={"1e-3": estimate, "1e-2": estimate},
        fmr_global={},
    )


def mode(
    name: str,
    eer: float | None,
    difference: Estimate | None = None,
    before: Estimate | None = None,
    *,
    anchor: Estimate | None = None,
    pairs: int = 100_000,
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
        cells={where: cell(eer, 0 if where in empty else pairs) for where in (ALL, FF, FP)},
        difference=everywhere(difference),
        versus_served=everywhere(before),
        versus_anchor=everywhere(anchor),
    )


def evaluation(*modes: ModeResult, subjects: int = 5) -> Evaluation:
    populations = {}
    if modes:
        populations[HELD_OUT] = Population(
            name=HELD_OUT,
            n_rows=10,
            n_subjects=subjects,
            left_out_subjects=0,
            left_out_rows=0,
            modes={one.mode: one for one in modes},
        )
    return Evaluation(
        release="r", resamples=100, seed=0, fmrs=["1e-3"], unlabelled_rows=0, duplicate_rows=0, populations=populations
    )


def served(
    eer: float | None, *modes: str, judged: tuple[GuardedResult, ...] = (), digest: str = "old", name: str = "r00001-aa"
) -> Release:
    """A release that is served, with or without a measurement of its modes."""
    model = ModelRef(path="", file_digest="", digest=digest, statistic="frozen", dim=4)
    figures = {one: cell(eer).eer for one in (RAW, *modes)} if eer is not None else {}
    decision = GateDecision(promoted=True, reason="", judged=list(judged))
    return Release.model_construct(
        release=name, models=dict.fromkeys(modes or ("per_sample",), model), gated=figures, gate=decision
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


def test_worse_than_raw_is_rejected_though_no_worse_than_served() -> None:
    model = mode("per_sample", 0.12, difference(0.01, 0.005, 0.02), before=difference(0.0, 0.0, 0.0))
    decision = decide(evaluation(RAW_MODE, model), GateSettings(), served(0.1, "per_sample"))
    assert not decision.promoted
    assert "+1.00 points against raw" in decision.reason


@pytest.mark.parametrize(
    ("low", "tolerance", "promoted"),
    [(0.0, 0.0, True), (1e-9, 0.0, False), (0.005, 0.005, True), (0.0051, 0.005, False), (-0.01, 0.0, True)],
)
def test_only_an_interval_above_the_tolerance_rejects(low: float, tolerance: float, promoted: bool) -> None:
    model = mode("per_sample", 0.12, difference(0.01, low, 0.02))
    settings = GateSettings(tolerance=tolerance, guards=())
    assert decide(evaluation(RAW_MODE, model), settings, None).promoted is promoted


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
    assert {(one.reference, one.outcome) for one in decision.judged} == {(None, "not compared"), (RAW, "not worse")}
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
    references = {(one.mode, one.reference) for one in decision.judged}
    assert references == {("per_sample", "r00001-aa"), ("per_sample", RAW), ("batch_stat", RAW)}
    assert decision.compared_with == "r00001-aa"
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
        "per_sample: frontal–frontal FNMR at global FMR 1% 5.00%, +39.00 points against raw (95% interval +30.00 to "
        "+50.00), significantly worse than the tolerance of 0.05 points (Holm over 2 comparisons); on 5 held-out "
        "subjects"
    )
    assert decide(evaluation(RAW_MODE, harmful), ONE, None).promoted


def test_guards_tolerate_noise_and_are_named() -> None:
    noisy = mode("per_sample", 0.05, BETTER, frontal=difference(0.004, 0.0004, 0.008))
    decision = decide(evaluation(RAW_MODE, noisy), GateSettings(), None)
    assert decision.promoted
    assert "; not significantly worse (95%) in frontal–frontal FNMR at global FMR 1%; on 5 held-out" in decision.reason
    assert decision.sentence == f"promoted: {decision.reason}"
    assert [one.outcome for one in decision.judged] == ["not worse"] * 2
    strict = GateSettings(guards=(Guard(cell=FF, metric="fnmr_global@1e-2", tolerance=0.0),))
    noisy = mode("per_sample", 0.05, BETTER, frontal=difference(0.005, 0.0012, 0.008))
    assert not decide(evaluation(RAW_MODE, noisy), strict, None).promoted


def test_tolerance_of_the_gate_is_tolerated_by_the_default_guards() -> None:
    harmful = mode("per_sample", 0.05, BETTER, frontal=difference(0.39, 0.3, 0.5))
    assert decide(evaluation(RAW_MODE, harmful), GateSettings(tolerance=1.0), None).promoted


def test_empty_cell_falls_back_to_all_pairs_and_that_is_said() -> None:
    no_pose = evaluation(mode(RAW, 0.11, empty=(FF, FP)), mode("per_sample", 0.09, BETTER, empty=(FF, FP)))
    assert gated(no_pose, GateSettings()).metric.cell == ALL
    decision = decide(no_pose, GateSettings(), None)
    assert decision.promoted
    assert len(decision.judged) == 2
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


def test_several_comparisons_share_the_level() -> None:
    """With four comparisons the smallest p-value is compared with a quarter of the level: 2.5 standard errors."""
    for errors, promoted in ((2.4, True), (2.6, False)):
        low = 0.01 - 0.01 / errors * 1.96
        modes = [
            mode(name, 0.1, difference(0.01, low, 0.02) if name == "per_sample" else BETTER, frontal=BETTER)
            for name in ("per_sample", "batch_stat")
        ]
        decision = decide(evaluation(RAW_MODE, *modes), GateSettings(), None)
        assert decision.promoted is promoted, errors
    assert decision.reason.count("(Holm over 4 comparisons)") == 1
    assert [one.outcome for one in decision.judged].count("worse") == 1


def within(relative: float) -> Estimate:
    """A difference of 0 to an error rate of 10%, whose one-sided 95% bound is this share of it."""
    return difference(0.0, -0.1 * relative * 1.96 / 1.645, 0.1 * relative * 1.96 / 1.645)


def test_no_release_may_be_inferior_to_the_anchor() -> None:
    first, before = served(0.1, "per_sample", name="r00001-anchor", digest="first"), served(0.1, "per_sample")

    def decided(anchor: Estimate | None, subjects: int = 100, **settings: object) -> GateDecision:
        model = mode("per_sample", 0.1, BETTER, before=SAME, anchor=anchor)
        return decide(evaluation(RAW_MODE, model, subjects=subjects), GateSettings(**settings), before, first)

    passed = decided(within(0.09))
    assert passed.promoted
    assert (passed.compared_with, passed.anchor) == ("r00001-aa", "r00001-anchor")
    assert (
        "0 points against the anchor r00001-anchor (95% interval −1.07 to +1.07), at most 9.0% above it"
        in passed.reason
    )
    assert passed.reason.endswith("; on 100 held-out subjects")
    # As good as the anchor, but nobody could tell: 1.2 of the margin needs (2 · 1.2)² times the subjects.
    unclear = decided(within(0.12))
    assert not unclear.promoted
    assert unclear.reason == (
        "cannot decide: per_sample: frontal–profile EER may be up to 12.0% above the anchor r00001-anchor (95%), more "
        "than [gate] margin = 0.1 allows; 100 held-out subjects are too few, about 576 are needed; label or hold out "
        "more subjects, or set [gate] undecided = 'promote'"
    )
    assert decided(within(0.12), margin=0.2).promoted
    accepted = decided(within(0.12), undecided="promote")
    assert accepted.promoted
    assert "; warning: per_sample: frontal–profile EER may be up to 12.0% above" in accepted.reason
    # Enough subjects, and 8% worse: not shown to be within the margin, whatever `undecided` says.
    worse = decided(difference(0.008, -0.002, 0.013), undecided="promote")
    assert not worse.promoted
    assert "+0.80 points against the anchor" in worse.reason
    assert "at most 13.3% above it (95%), more than [gate] margin = 0.1 allows; on 100" in worse.reason
    # Within the margin, yet significantly worse.
    assert "significantly worse" in decided(difference(0.004, 0.003, 0.005)).reason
    # The anchor was measured: what cannot be compared with it is rejected.
    lost = decided(None)
    assert not lost.promoted
    assert "cannot be compared with the anchor r00001-anchor" in lost.reason
    assert "`frontalis anchor`" in lost.reason
    assert decided(None, unmeasured="promote").promoted


def test_a_model_that_is_served_already_needs_no_judgement() -> None:
    before = served(0.1, "per_sample", digest="per_sample")
    harmful = difference(0.02, 0.01, 0.03)
    first = served(0.1, "per_sample", name="r00001-anchor", digest="first")
    for known in (SAME, None):
        model = mode("per_sample", 0.1, harmful, before=known, anchor=harmful)
        decision = decide(evaluation(RAW_MODE, model), GateSettings(), before, first)
        assert decision.promoted
        assert decision.reason.startswith(
            "per_sample: frontal–profile EER 10.00%, 0 points" if known else "per_sample: the model of r00001-aa"
        )
    # Its features have changed all the same, as where the embeddings are of another recogniser.
    assert not decide(
        evaluation(RAW_MODE, mode("per_sample", 0.1, BETTER, before=harmful)), ONE, before, first
    ).promoted
    # A model that returns to that of the anchor is compared with what is served, and with raw.
    back = decide(
        evaluation(RAW_MODE, mode("per_sample", 0.1, BETTER, before=SAME)),
        GateSettings(),
        served(0.1, "per_sample"),
        served(0.1, "per_sample", name="r00001-anchor", digest="per_sample"),
    )
    assert back.promoted
    assert "per_sample: the model of r00001-anchor" in back.reason


def test_too_few_subjects_are_a_warning_of_a_first_release() -> None:
    model = mode("per_sample", 0.1, within(0.2))
    first = decide(evaluation(RAW_MODE, model, subjects=33), GateSettings(), None)
    assert first.promoted
    assert first.reason.endswith(
        "; on 33 held-out subjects; warning: per_sample: frontal–profile EER may be up to 20.0% above raw (95%), more "
        "than [gate] margin = 0.1 allows; 33 held-out subjects are too few, about 528 are needed"
    )


def test_a_metric_on_fewer_than_thirty_false_matches_decides_nothing() -> None:
    """100 impostor pairs: an EER of 10% rests on 10 false matches, FNMR at FMR 1% on one."""
    worse = difference(0.02, 0.01, 0.03)
    few = mode("per_sample", 0.1, worse, before=worse, pairs=100)
    first = decide(evaluation(RAW_MODE, few, subjects=20), GateSettings(), None)
    assert first.promoted
    assert first.reason.endswith(
        "warning: per_sample: frontal–frontal FNMR at global FMR 1% rests on fewer than 30 false matches; 20 held-out "
        "subjects are too few, about 110 are needed"
    )
    later = decide(evaluation(RAW_MODE, few, subjects=20), GateSettings(), served(0.1, "per_sample"))
    assert not later.promoted
    assert later.reason.startswith("cannot decide: per_sample: ")
    assert {one.outcome for one in later.judged} == {"undecided"}
    same = mode("per_sample", 0.1, SAME, before=SAME, pairs=100)
    assert decide(evaluation(RAW_MODE, same, subjects=20), GateSettings(), served(0.1, "per_sample")).promoted


def test_a_statistic_of_the_batch_is_compared_with_the_served_release_in_place_of_the_anchor() -> None:
    before = served(0.1, "batch_stat")
    first = served(0.1, "batch_stat", name="r00001-anchor", digest="first")
    batch = first.models["batch_stat"].model_copy(update={"statistic": "batch"})
    first = first.model_copy(update={"models": {"batch_stat": batch}})
    model = mode("batch_stat", 0.1, BETTER, before=within(0.2))
    decision = decide(evaluation(RAW_MODE, model, subjects=33), GateSettings(), before, first)
    assert decision.reason.startswith(
        "cannot decide: batch_stat: frontal–profile EER may be up to 20.0% above the anchor"
    )
    assert {one.reference for one in decision.judged if one.against == "anchor"} == {"r00001-aa"}
