"""The tables of the report, as rows of strings for HTML or Markdown.

Each metric is shown with its interval, its difference from raw and whether that difference is significant, or with the
number of the footnote that says why it is not estimable. Layout and escaping are left to the caller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from reports.text import (
    FEW_FALSE_MATCHES,
    NOT_ESTIMABLE,
    Verdict,
    cell_name,
    interval,
    is_unreliable,
    metric_name,
    negated,
    pairs_remarks,
    percent,
    percent_of,
    points,
    points_interval,
    threshold,
    verdict,
)
from reports.theme import mode_role
from schemas.metrics import ALL, EER, MAIN_CELLS, RAW, MetricId
from schemas.reports import Estimate, Evaluation, GatedMetric, ModeResult, Population, StageCost

_SIGNS: dict[Verdict, str] = {"better": "↓", "worse": "↑", "no difference": "=", "no interval": "?"}
_SIGNS_HIGHER: dict[Verdict, str] = _SIGNS | {"better": "↑", "worse": "↓"}
_MARKS = {RAW: "●", "per_sample": "■", "batch_stat": "▲"}


@dataclass(frozen=True)
class Shown:
    """An estimate as a table shows it; `note` numbers the footnote that says why there is no value.

    `unreliable` numbers the footnote that says why the value is not to be relied on.
    """

    value: str
    between: str | None = None
    note: int | None = None
    reason: str | None = None
    unreliable: int | None = None
    difference: str | None = None
    difference_between: str | None = None
    verdict: Verdict | None = None
    also: str | None = None
    higher_is_better: bool = False

    @property
    def sign(self) -> str:
        """Return the sign of the verdict, which shows it without colour: the direction of the difference."""
        signs = _SIGNS_HIGHER if self.higher_is_better else _SIGNS
        return signs[self.verdict] if self.verdict else ""


@dataclass(frozen=True)
class ModeName:
    """A mode in a table: its name, its mark in the plots and the role of its colour."""

    name: str
    mark: str
    role: str


@dataclass
class Table:
    """Rows of estimates, in groups, with the footnotes that they need."""

    caption: str
    heads: list[str]
    groups: list[tuple[str, str, list[tuple[ModeName, list[Shown]]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def show(
        self,
        estimate: Estimate | None,
        difference: Estimate | None = None,
        *,
        higher_is_better: bool = False,
        false_matches: int | None = None,
    ) -> Shown:
        """Format an estimate, and its difference where there is one; number the reason of a missing one.

        It is unreliable where it rests on too few `false_matches`, None where it rests on none.
        """
        if estimate is None:
            return Shown("\N{EN DASH}")
        if estimate.value is None:
            reason = estimate.reason or "not estimable"
            return Shown(NOT_ESTIMABLE, note=self._note(reason), reason=reason)
        unreliable = self._note(FEW_FALSE_MATCHES) if is_unreliable(false_matches) else None
        if difference is None or difference.value is None:
            return Shown(percent(estimate.value), interval(estimate), unreliable=unreliable)
        return Shown(
            percent(estimate.value),
            interval(estimate),
            unreliable=unreliable,
            difference=points(difference.value),
            difference_between=points_interval(difference),
            verdict=verdict(negated(difference) if higher_is_better else difference),
            higher_is_better=higher_is_better,
        )

    def _note(self, text: str) -> int:
        """Return the number of a footnote, a new one where it is not there yet."""
        if text not in self.notes:
            self.notes.append(text)
        return self.notes.index(text) + 1


def filled(population: Population) -> list[str]:
    """Return the cells that hold any pair, as they come."""
    return list(
        dict.fromkeys(
            name
            for mode in population.modes.values()
            for name, cell in mode.cells.items()
            if cell.n_genuine or cell.n_impostor
        )
    )


def present(population: Population, cells: Sequence[str]) -> list[str]:
    """Return those of `cells` that hold any pair."""
    there = filled(population)
    return [cell for cell in cells if cell in there]


def pose_table(population: Population, cells: Sequence[str], metrics: Sequence[MetricId]) -> Table:
    """Build the table of modes within pose pairs, with differences to raw."""
    title = "Modes by pose pair" if ALL in cells else "Modes by other pose pairs"
    table = Table(f"{title}, population {population.name}", [metric_name(metric) for metric in metrics])

    def show(mode: ModeResult, cell: str) -> list[Shown]:
        result = mode.cells[cell]
        return [
            table.show(
                result.estimate(metric),
                mode.difference_to_raw(cell, metric),
                false_matches=mode.false_matches(cell, metric),
            )
            for metric in metrics
        ]

    _add_pose_pairs(table, population, cells, show)
    return table


def _add_pose_pairs(
    table: Table, population: Population, cells: Sequence[str], show: Callable[[ModeResult, str], list[Shown]]
) -> None:
    """Add a group for each pose pair: its number of pairs, and a row for each mode that has it."""
    for cell in cells:
        rows, sizes = [], ""
        for mode in population.modes.values():
            if result := mode.cells.get(cell):
                sizes = f"{result.n_genuine:,} genuine, {result.n_impostor:,} impostor pairs"
                rows.append((mode_name(mode.mode, population), show(mode, cell)))
        table.groups.append((cell_name(cell), sizes, rows))


def gate_tiles(population: Population, gated: GatedMetric) -> list[tuple[ModeName, Shown, Shown | None]]:
    """Return the gated metric of each mode, with its difference to raw, and again with that to the served release."""
    table = Table("", [])
    tiles = []
    for mode in population.modes.values():
        result = mode.cells.get(gated.cell)
        estimate = result.estimate(gated.metric) if result else None
        if estimate is None:
            continue
        served = mode.difference_to_served(gated.cell, gated.metric)
        shown = table.show(estimate, mode.difference_to_raw(gated.cell, gated.metric))
        versus = table.show(estimate, served) if served and served.value is not None else None
        tiles.append((mode_name(mode.mode, population), shown, versus))
    return tiles


def detail_table(population: Population, fmrs: Sequence[str]) -> Table:
    """Build the folded table: every pose pair, AUC, d′ and every operating point at the pose pair's own threshold."""
    heads = ["AUC, %", "d\N{PRIME}", "EER", *(metric_name(MetricId.at("fnmr", fmr)) for fmr in fmrs)]
    table = Table("Every pose pair at thresholds of its own", heads)

    def show(mode: ModeResult, cell: str) -> list[Shown]:
        result = mode.cells[cell]
        d_prime = Shown("\N{EN DASH}" if result.d_prime is None else f"{result.d_prime:.2f}")
        own = [
            table.show(result.fnmr.get(fmr), false_matches=mode.false_matches(cell, MetricId.at("fnmr", fmr)))
            for fmr in fmrs
        ]
        return [
            table.show(result.auc),
            d_prime,
            table.show(result.eer, false_matches=mode.false_matches(cell, EER)),
            *own,
        ]

    _add_pose_pairs(table, population, filled(population), show)
    return table


def threshold_table(population: Population, fmrs: Sequence[str]) -> Table:
    """Build the folded table of each mode's global thresholds, and the FMR at them within each pose pair."""
    table = Table("Global thresholds, and the FMR at them by pose pair", [f"global FMR {percent_of(f)}" for f in fmrs])
    modes = [(mode_name(mode.mode, population), mode) for mode in population.modes.values() if ALL in mode.cells]

    def score(mode: ModeResult, fmr: str) -> Shown:
        at = mode.thresholds.get(fmr)
        return table.show(mode.cells[ALL].fnmr_global.get(fmr)) if at is None else Shown(threshold(at))

    def rate(mode: ModeResult, cell: str, fmr: str) -> Shown:
        found = Estimate(value=mode.cells[cell].fmr_global.get(fmr), reason="not estimable: there is no impostor pair")
        return score(mode, fmr) if mode.thresholds.get(fmr) is None else table.show(found)

    rows = [(name, [score(mode, fmr) for fmr in fmrs]) for name, mode in modes]
    table.groups.append(("threshold", "a pair matches at this score or above", rows))
    for cell in filled(population):
        rows = [(name, [rate(mode, cell, fmr) for fmr in fmrs]) for name, mode in modes if cell in mode.cells]
        table.groups.append((cell_name(cell), "FMR, %", rows))
    return table


def search_table(population: Population) -> tuple[str, Table] | None:
    """Build the table of 1:N search and the sentence that says what was searched for in what."""
    found = [mode for mode in population.modes.values() if mode.identification]
    if not found:
        return None
    one = found[0].identification
    assert one is not None
    ranks = _keys(mode.identification.rank for mode in found if mode.identification)
    # Where the index is exact, what it finds is what is found, and recall is 1 by construction.
    lossy = {mode.identification.index_kind for mode in found if mode.identification} - {"Flat"}
    recall = _keys(mode.identification.index_recall for mode in found if mode.identification and lossy)
    fpirs = _keys(mode.identification.fnir for mode in found if mode.identification)[::-1]
    heads = [f"rank {key}" for key in ranks] + [f"FNIR at FPIR {percent_of(key)}" for key in fpirs]
    heads += [f"recall@{key} of that index" for key in recall]
    table = Table("Search, 1:N", heads)
    rows = []
    for mode in found:
        result = mode.identification
        assert result is not None
        by_index = {key: value for key, value in result.index_rank.items() if value is not None and lossy}
        shown = [
            replace(table.show(result.rank.get(key)), also=percent(by_index[key]) if key in by_index else None)
            for key in ranks
        ]
        shown += [table.show(result.fnir.get(key)) for key in fpirs]
        shown += [
            table.show(
                Estimate(value=result.index_recall[key], reason="not measured") if key in result.index_recall else None
            )
            for key in recall
        ]
        rows.append((mode_name(mode.mode, population), shown))
    table.groups.append(("", "", rows))
    sentence = (
        f"{one.n_mated:,} mated {one.probes} probes and {one.n_non_mated:,} non-mated ones against a "
        f"{one.gallery} gallery of {one.n_gallery:,} rows of {one.n_gallery_subjects:,} subjects. "
        "Rates are in percent, with 95% intervals."
    )
    if lossy:
        kinds = ", ".join(sorted(lossy))
        sentence += f" Second line: the same through an index that the settings build over this gallery ({kinds})."
    return sentence, table


def index_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the rows of the table of the release's own indexes, by mode."""
    return [
        {
            "mode": ModeName(mode, _MARKS.get(mode, "◆"), mode_role(mode, list(evaluation.indexes))),
            "kind": index.kind,
            "rows": f"{index.rows:,}",
            "recall": [percent(one) for one in (index.recall_at_1, index.recall_at_10)] if index.queries else None,
            "queries": f"{index.queries:,}",
        }
        for mode, index in evaluation.indexes.items()
    ]


def stage_rows(stages: Sequence[StageCost]) -> list[list[str]]:
    """Return the cells of the table of stages: name, seconds, CPU seconds, rows, rows a second, peak memory in MB."""
    return [
        [
            one.stage,
            f"{one.seconds:,.1f}",
            f"{one.cpu_seconds:,.1f}",
            *("" if number is None else f"{number:,.0f}" for number in (one.rows, one.rows_per_second)),
            "" if one.peak_megabytes is None else f"{one.peak_megabytes:,}",
        ]
        for one in stages
    ]


def _keys(results: Any) -> list[str]:
    return sorted({key for one in results for key in one}, key=float)


def accuracy_rows(population: Population) -> list[dict[str, Any]]:
    """Return the rows of the table of pairs-file protocols."""
    return [
        {
            "protocol": pairs.protocol,
            "mode": mode_name(mode.mode, population),
            "accuracy": None
            if pairs.accuracy_mean is None
            else percent(pairs.accuracy_mean)
            + ("" if pairs.accuracy_sd is None else f" ± {percent(pairs.accuracy_sd)}"),
            "reason": pairs.reason or "not estimable",
            "eer": None if pairs.eer is None else percent(pairs.eer),
            "pairs": f"{pairs.n_pairs:,}",
            "missing": f"{pairs.missing:,}",
            "remarks": pairs_remarks(pairs),
            "folds": pairs.n_folds,
        }
        for mode in population.modes.values()
        for pairs in mode.pairs
    ]


def versus_rows(population: Population) -> list[dict[str, Any]]:
    """Return the rows of the table that compares the re-weighted modes with each other, in percentage points."""
    return [
        {
            "mode": mode_name(mode.mode, population),
            "other": other,
            "cell": cell_name(cell),
            "eer": _points_with_interval(differences[cell].get(EER)),
            "fnmr": _points_with_interval(differences[cell].get(MetricId("fnmr_global@1e-3"))),
        }
        for mode in population.modes.values()
        for other, differences in mode.versus_modes.items()
        for cell in MAIN_CELLS
        if cell in differences
    ]


def _points_with_interval(difference: Estimate | None) -> str | None:
    if difference is None or difference.value is None:
        return None
    between = points_interval(difference)
    return points(difference.value) + (f" ({between}), {verdict(difference)}" if between else "")


def mode_name(mode: str, population: Population) -> ModeName:
    """Return a mode as tables show it."""
    return ModeName(mode, _MARKS.get(mode, "◆"), mode_role(mode, list(population.modes)))
