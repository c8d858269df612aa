"""Limits on what a release may lack: where they reject, what lets it pass, and what is said."""

import pytest

from schemas.releases import Release
from schemas.reports import Changes, DataQuality, GateDecision
from schemas.settings import GateSettings
from tasks.removal import is_allowed_now, limit_removal

GOOD = GateDecision(promoted=True, reason="better")


def data(quarantined: int = 0, bad_shards: int = 0) -> DataQuality:
    return DataQuality(
        shards=10, rows_read=100, rows_features=100 - quarantined, quarantined={"not_finite": quarantined},
        rows_in_bad_shards=bad_shards,
    )  # fmt: skip


def changes(**counts: object) -> Changes:
    values = {"rows_before": 100, "rows_added": 0, "rows_changed": 0, "rows_removed": 0, "shards_before": 10,
              "shards_removed": 0, "subjects_before": 20}  # fmt: skip
    return Changes(since="r1", **{**values, **counts})


SERVED = Release.model_construct(release="r1", data=data(10))


@pytest.mark.parametrize(
    ("count", "setting"),
    [
        ("rows_removed", "max_removed_rows"),
        ("shards_removed", "max_removed_shards"),
        ("subjects_removed", "max_removed_subjects"),
    ],
)
def test_more_than_the_limit_is_rejected(count: str, setting: str) -> None:
    before = {"rows_removed": 100, "shards_removed": 10, "subjects_removed": 20}[count]
    exactly, more = changes(**{count: before // 5}), changes(**{count: before // 5 + 1})
    strict, lax = GateSettings(), GateSettings(**{setting: 0.5})
    assert limit_removal(GOOD, exactly, data(), SERVED, strict, allowed=False).promoted
    rejected = limit_removal(GOOD, more, data(), SERVED, strict, allowed=False)
    assert not rejected.promoted
    assert f"would be removed, more than [gate] {setting} = 0.2 allows" in rejected.reason
    assert rejected.compared_with == "r1"
    assert [limit.setting for limit in rejected.limits if limit.exceeded] == [setting]
    assert limit_removal(GOOD, more, data(), SERVED, lax, allowed=False).reason == "better"
    allowed = limit_removal(GOOD, more, data(), SERVED, strict, allowed=True)
    assert allowed.promoted
    assert allowed.reason.startswith("better; ")
    assert allowed.reason.endswith("passed by --allow-removal")


@pytest.mark.parametrize(
    ("quarantined", "in_bad_shards", "served", "promoted"),
    [(20, 0, None, True), (21, 0, None, False), (0, 26, None, False), (30, 0, SERVED, True), (31, 0, SERVED, False)],
)
def test_quarantined_share_may_rise_by_the_limit(
    quarantined: int, in_bad_shards: int, served: Release | None, promoted: bool
) -> None:
    """The served release has 10% already; a first release is compared with none."""
    since = changes() if served else None
    found = limit_removal(GOOD, since, data(quarantined, in_bad_shards), served, GateSettings(), allowed=False)
    assert found.promoted is promoted
    if not promoted:
        assert "rows of the source" in found.reason
        assert ("(10.0% in r1)" in found.reason) is (served is not None)


def test_both_reasons_are_given() -> None:
    worse = GateDecision(promoted=False, reason="worse")
    found = limit_removal(worse, changes(rows_removed=50), data(), SERVED, GateSettings(), allowed=False)
    assert found.reason.startswith("50 of 100 rows (50.0%) of r1 would be removed")
    assert found.reason.endswith("; worse")
    assert limit_removal(worse, changes(), data(), SERVED, GateSettings(), allowed=True).reason == "worse"


def test_a_mode_leaves_by_its_name_alone() -> None:
    lacking = changes(modes_removed=["batch_stat"])
    for allowed in (False, True):
        found = limit_removal(GOOD, lacking, data(), SERVED, GateSettings(), allowed=allowed)
        assert (found.promoted, found.missing_modes) == (False, ["batch_stat"])
        assert found.reason == "r1 serves batch_stat, which this run lacks; pass the model, or --drop-mode batch_stat"
    named = GateSettings(drop_modes=("batch_stat",))
    assert limit_removal(GOOD, lacking, data(), SERVED, named, allowed=False).reason == "better"


def test_what_was_rejected_for_its_removals_alone_can_be_allowed_later() -> None:
    lacking = changes(rows_removed=50, modes_removed=["batch_stat"])
    rejected = limit_removal(GOOD, lacking, data(), SERVED, GateSettings(), allowed=False)
    release = Release.model_construct(gate=rejected, serving=False)
    named = GateSettings(drop_modes=("batch_stat",))
    assert is_allowed_now(release, named, allowed=True)
    assert not is_allowed_now(release, named, allowed=False)
    assert not is_allowed_now(release, GateSettings(), allowed=True)
    assert not is_allowed_now(Release.model_construct(gate=GOOD, serving=False), named, allowed=True)
    worse = Release.model_construct(gate=GateDecision(promoted=False, reason="worse"), serving=False)
    assert not is_allowed_now(worse, named, allowed=True)
