import pytest

from reports.tables import (
    Shown,
    Table,
    accuracy_rows,
    detail_table,
    filled,
    gate_tiles,
    index_rows,
    pose_table,
    present,
    search_table,
    stage_rows,
    threshold_table,
    versus_rows,
)
from reports.text import percent
from schemas.metrics import EER, MetricId
from schemas.reports import Estimate, GatedMetric, Population, ReportInput


@pytest.fixture
def population(report_input: ReportInput) -> Population:
    return report_input.evaluation.populations["held_out"]


def test_an_estimate_is_shown_with_interval_difference_and_verdict() -> None:
    shown = Table("t", []).show(
        Estimate(value=0.1257, low=0.12, high=0.13), Estimate(value=-0.02, low=-0.03, high=-0.01)
    )
    assert shown == Shown(
        "12.57", "12.00 to 13.00", difference="−2.00", difference_between="−3.00 to −1.00", verdict="better"
    )
    assert shown.sign == "↓"


@pytest.mark.parametrize(("low", "high", "sign"), [(0.1, 0.2, "↑"), (-0.1, 0.2, "="), (None, None, "?")])
def test_each_verdict_has_a_sign_of_its_own(low: float | None, high: float | None, sign: str) -> None:
    difference = Estimate(value=0.1, low=low, high=high)
    assert Table("t", []).show(Estimate(value=0.2), difference).sign == sign


def test_reasons_are_numbered_once_each() -> None:
    table = Table("t", [])
    few, ties = (Estimate(value=None, reason=f"not estimable: {why}") for why in ("too few", "ties"))
    assert [table.show(one).note for one in (few, ties, few)] == [1, 2, 1]
    assert table.notes == ["not estimable: too few", "not estimable: ties"]
    assert table.show(Estimate(value=None)).reason == "not estimable"
    assert table.show(None) == Shown("–")


def test_a_metric_on_few_false_matches_is_shown_with_a_note_that_says_so(population: Population) -> None:
    table = Table("t", [])
    shown = [table.show(Estimate(value=0.1), false_matches=number).unreliable for number in (29, 30, None)]
    assert shown == [1, None, None]
    assert table.notes == ["unreliable: rests on fewer than 30 false matches"]
    details = detail_table(population, ["1e-2", "1e-3"])  # 12,000 frontal–profile impostor pairs
    (cells,) = [rows for title, _, rows in details.groups if title == "frontal–profile"]
    assert [cell.unreliable is None for cell in cells[0][1]] == [True, True, True, True, False]


def test_a_missing_value_is_never_given_a_difference() -> None:
    shown = Table("t", []).show(Estimate(value=None, reason="ties"), Estimate(value=0.1, low=0.05, high=0.2))
    assert (shown.value, shown.verdict) == ("n/e", None)


def test_pose_table_holds_every_mode_of_every_cell_with_raw_as_its_baseline(population: Population) -> None:
    table = pose_table(population, ["all", "frontal-profile"], [EER, MetricId("fnmr_global@1e-3")])
    assert table.heads == ["EER", "FNMR at global FMR 0.1%"]
    assert [title for title, _, _ in table.groups] == ["all pairs", "frontal–profile"]
    _, sizes, rows = table.groups[1]
    assert sizes == "1,500 genuine, 12,000 impostor pairs"
    assert [name.name for name, _ in rows] == ["raw", "per_sample", "batch_stat"]
    assert len({name.mark for name, _ in rows}) == 3
    assert rows[0][1][0].verdict is None
    value = population.modes["per_sample"].cells["frontal-profile"].eer.value
    assert rows[1][1][0].value == f"{100 * value:.2f}"
    assert rows[1][1][0].verdict == "better"
    at_the_one_threshold = population.modes["per_sample"].cells["frontal-profile"].fnmr_global["1e-3"]
    assert rows[1][1][1].value == f"{100 * at_the_one_threshold.value:.2f}"
    assert rows[1][1][1].verdict == "better"


def test_gate_tiles_show_the_difference_to_raw_and_to_the_served_release(population: Population) -> None:
    gated = GatedMetric(population="held_out", cell="frontal-profile", metric="eer")
    tiles = gate_tiles(population, gated)
    assert [(name.name, served is None) for name, _, served in tiles] == [
        ("raw", True), ("per_sample", False), ("batch_stat", True),
    ]  # fmt: skip
    _, shown, served = tiles[1]
    assert served is not None
    assert (
        shown.difference == f"−{-100 * population.modes['per_sample'].difference['frontal-profile']['eer'].value:.2f}"
    )
    assert (served.difference, served.verdict) == ("+0.12", "no difference")
    assert gate_tiles(population, GatedMetric(population="held_out", cell="nowhere", metric="eer")) == []


def test_detail_table_holds_every_cell_and_operating_point(population: Population) -> None:
    table = detail_table(population, ["1e-1", "1e-5"])
    assert [title for title, _, _ in table.groups] == [
        "frontal–frontal", "frontal–profile", "profile–profile", "frontal–half", "half–half", "half–profile",
        "all pairs",
    ]  # fmt: skip
    cells = table.groups[0][2][0][1]
    assert [cell.value for cell in cells[:2]] == ["97.00", "3.10"]
    assert cells[-1].value == "n/e"
    assert table.notes == [
        "not estimable: 12000 impostor pairs are too few",
        "not estimable: 72000 impostor pairs are too few",
    ]


def test_threshold_table_holds_each_modes_threshold_and_the_fmr_of_each_cell(population: Population) -> None:
    table = threshold_table(population, ["1e-3", "1e-5"])
    assert table.heads == ["global FMR 0.1%", "global FMR 0.001%"]
    assert [title for title, _, _ in table.groups][:3] == ["threshold", "frontal–frontal", "frontal–profile"]
    mode = population.modes["per_sample"]
    printed, missing = table.groups[0][2][1][1]
    assert 0 <= mode.thresholds["1e-3"] - float(printed.value) <= 1e-7
    assert (missing.value, table.notes) == ("n/e", ["not estimable: 72000 impostor pairs are too few"])
    assert table.groups[2][2][1][1][0].value == percent(mode.cells["frontal-profile"].fmr_global["1e-3"])


def test_search_table_sets_an_index_of_the_same_kind_beside_the_exact_search(population: Population) -> None:
    found = search_table(population)
    assert found is not None
    sentence, table = found
    assert sentence.startswith("1,120 mated profile probes and 276 non-mated ones against a frontal gallery of")
    assert table.heads[:4] == ["rank 1", "rank 5", "rank 10", "FNIR at FPIR 10%"]
    raw = table.groups[0][2][0][1]
    assert [cell.value for cell in raw] == ["81.00", "88.00", "91.00", "31.00", "49.00", "n/e", "99.80", "99.50"]
    assert [cell.also for cell in raw[:4]] == ["81.00", "88.00", "90.00", None]
    assert sentence.endswith("through an index that the settings build over this gallery (IVF64,Flat).")
    assert "served" not in sentence


def test_an_exact_index_over_the_sample_proves_nothing_and_is_not_shown(population: Population) -> None:
    flat = {
        name: mode.model_copy(update={"identification": mode.identification.model_copy(update={"index_kind": "Flat"})})
        for name, mode in population.modes.items()
        if mode.identification is not None
    }
    sentence, table = search_table(population.model_copy(update={"modes": flat})) or ("", Table("", []))
    assert not [head for head in table.heads if "recall" in head]
    assert {cell.also for _, cells in table.groups[0][2] for cell in cells} == {None}
    assert "index" not in sentence


def test_the_indexes_of_the_release_are_shown_with_what_was_measured_of_them(report_input: ReportInput) -> None:
    raw, per_sample = index_rows(report_input.evaluation)
    assert (raw["mode"].name, raw["kind"], raw["rows"], raw["recall"]) == ("raw", "Flat", "4,874", None)
    assert per_sample["mode"].name == "per_sample"
    assert (per_sample["kind"], per_sample["recall"], per_sample["queries"]) == (
        "IVF256,SQ8",
        ["97.20", "96.34"],
        "256",
    )


def test_stages_are_shown_with_their_rate_and_what_was_not_measured_is_left_empty(report_input: ReportInput) -> None:
    _, reweight, publish = stage_rows(report_input.stages)
    assert reweight == ["reweight", "0.5", "1.0", "4,911", "9,822", "1,690"]
    assert publish == ["publish", "0.0", "0.0", "", "", ""]


def test_search_table_is_absent_where_nothing_was_searched(population: Population) -> None:
    modes = {name: mode.model_copy(update={"identification": None}) for name, mode in population.modes.items()}
    assert search_table(population.model_copy(update={"modes": modes})) is None


def test_accuracy_is_printed_or_its_absence_explained(population: Population) -> None:
    rows = accuracy_rows(population)
    assert (rows[0]["accuracy"], rows[0]["eer"], rows[0]["missing"]) == ("89.66 ± 1.82", "11.47", "3")
    raw = population.modes["raw"]
    lost = raw.pairs[0].model_copy(update={"accuracy_mean": None, "eer": None, "reason": "one fold only"})
    only = population.model_copy(update={"modes": {"raw": raw.model_copy(update={"pairs": [lost]})}})
    assert (accuracy_rows(only)[0]["accuracy"], accuracy_rows(only)[0]["reason"]) == (None, "one fold only")


def test_present_keeps_the_order_asked_for(population: Population) -> None:
    assert present(population, ["profile-profile", "nowhere", "all"]) == ["profile-profile", "all"]


def test_a_cell_without_a_pair_is_not_shown(population: Population) -> None:
    raw = population.modes["raw"]
    empty = raw.cells["half-half"].model_copy(update={"n_genuine": 0, "n_impostor": 0})
    some = population.model_copy(
        update={"modes": {"raw": raw.model_copy(update={"cells": {**raw.cells, "half-half": empty}})}}
    )
    assert set(filled(population)) - set(filled(some)) == {"half-half"}


def test_modes_are_set_against_each_other(report_input) -> None:
    population = next(one for one in report_input.evaluation.populations.values() if len(one.modes) > 1)
    (row,) = versus_rows(population)
    assert (row["mode"].name, row["other"], row["cell"]) == ("batch_stat", "per_sample", "all pairs")
    assert row["eer"] == "+0.30 (+0.10 to +0.50), worse"
    assert row["fnmr"] is None
