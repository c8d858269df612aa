"""Evaluations on a terminal: error rates by pose pair and mode beside raw, and on demand all that was measured.

The table has as many columns as the terminal has room for: at 80 columns the rates with their verdicts, at 100 also the
differences, else everything. `--details` adds thresholds, 1:N search, pairs files of other populations and indexes.
"""

import math
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from frontalis.terminal import fact, new_table, plain, say, show_table
from reports.expansion import expansion_advice
from reports.tables import filled
from reports.text import (
    FEW_FALSE_MATCHES,
    cell_name,
    interval,
    is_unreliable,
    pairs_remarks,
    percent,
    points,
    points_interval,
    population_name,
    verdict,
)
from schemas.metrics import ALL, EER, FRONTAL_PROFILE, HELD_OUT, MAIN_CELLS, RAW, MetricId
from schemas.reports import Estimate, Evaluation, IdentificationResult, ModeResult, PairsResult, Population

FNMR = "fnmr_global"
LABELS = ("pose pair", "mode")


def show_evaluation(console: Console, evaluation: Evaluation, *, details: bool = False) -> None:
    """Print the error rates on held-out subjects; with `details` of every population, and all else."""
    chosen = evaluation.populations
    if not details and chosen.get(HELD_OUT) is not None and filled(chosen[HELD_OUT]):
        chosen = {HELD_OUT: chosen[HELD_OUT]}
    for population in chosen.values():
        _error_rates(console, population, evaluation)
        for mode, result in population.modes.items():
            for one in result.pairs:
                fact(console, "pairs", f"{mode}, {_pairs_file(one)}")
        if details:
            _details(console, population)
            console.print()
    if details:
        for mode, index in evaluation.indexes.items():
            recall = f"recall@1 {percent(index.recall_at_1)}%, recall@10 {percent(index.recall_at_10)}%"
            found = f"{recall} over {index.queries:,} queries" if index.queries else "exact"
            fact(console, "index", f"{mode}: {index.kind}, {index.rows:,} rows, {found}")
    for note in evaluation.notes:
        fact(console, "note", note)


def _details(console: Console, population: Population) -> None:
    modes = population.modes
    for mode, result in modes.items():
        exact = ", ".join(f"FMR {fmr}: {_threshold(at)}" for fmr, at in result.thresholds.items())
        fact(console, "score >=", f"{mode}, global {exact}")
    for mode, result in modes.items():
        for other, differences in result.versus_modes.items():
            for cell in (ALL, FRONTAL_PROFILE):
                if cell in differences:
                    eer = _difference(differences[cell].get(EER))
                    fact(console, "modes", f"{mode} − {other}, {cell_name(cell)} EER, points: {eer}")
    for mode, result in modes.items():
        if result.identification is not None:
            fact(console, "1:N", f"{mode}, {_identification(result.identification)}")
            if expansion := result.identification.expansion:
                fact(console, "expansion", f"{mode}, {expansion.rows} rows: {expansion_advice(expansion)}")


def _error_rates(console: Console, population: Population, evaluation: Evaluation) -> None:
    excluded = f", {population.left_out_subjects:,} excluded" if population.left_out_subjects else ""
    if population.sampled_from_subjects:
        excluded += f", sampled from {population.sampled_from_subjects:,}"
    title = f"{population_name(population)}: {population.n_subjects:,} subjects{excluded}, "
    title += f"{population.n_rows:,} rows, {evaluation.release}"
    metrics = [EER, *(MetricId.at(FNMR, fmr) for fmr in ("1e-2", "1e-3") if fmr in evaluation.fmrs)]
    main = [EER, metrics[-1]] if len(metrics) > 1 else [EER]
    compared = main if len(population.modes) > 1 else []
    tables = [
        _wide(population, metrics, compared),
        _narrow(population, main, compared, differences=True),
        _narrow(population, main, compared, differences=False),
    ]
    show_table(console, title, *tables)
    few = any(
        is_unreliable(result.false_matches(cell, metric))
        for cell in filled(population)
        for result in population.modes.values()
        for metric in metrics
    )
    if few:
        say(console, f"(few) {FEW_FALSE_MATCHES}")
    if len(metrics) > 1:
        say(console, "FNMR: at one threshold per mode; the FMR is over all impostor pairs")


def _rows(population: Population) -> Iterator[tuple[str, str, ModeResult]]:
    """Yield cell, mode and result in the order of the table."""
    for cell in sorted(filled(population), key=(*MAIN_CELLS, *filled(population)).index):
        for mode, result in population.modes.items():
            yield cell, mode, result


def _wide(population: Population, metrics: list[MetricId], compared: list[MetricId]) -> Table:
    """Return the table with every interval and count."""
    rates = ["EER %" if one == EER else f"FNMR % @ global FMR {one.fmr_text}" for one in metrics]
    changes = ["EER − raw, points" if one == EER else f"FNMR @ {one.fmr_text} − raw, points" for one in compared]
    numbers = (*rates, *changes, "genuine", "impostor")
    table = new_table(*LABELS, *numbers, right=numbers)
    for cell, mode, result in _rows(population):
        found = result.cells[cell]
        table.add_row(
            cell_name(cell) if mode == RAW else "",
            mode,
            *(
                _with_interval(found.estimate(metric)) + _unreliable(result.false_matches(cell, metric))
                for metric in metrics
            ),
            *(_coloured(result.difference_to_raw(cell, metric)) for metric in compared),
            f"{found.n_genuine:,}",
            f"{found.n_impostor:,}",
        )
    return table


def _narrow(population: Population, metrics: list[MetricId], compared: list[MetricId], *, differences: bool) -> Table:
    """Return the table without intervals and counts: each rate, and beside it whether it differs from raw."""
    table = new_table(*LABELS)
    for metric in metrics:
        table.add_column("EER %" if metric == EER else f"FNMR@{metric.fmr_text} %", justify="right", no_wrap=True)
        if metric in compared and differences:
            table.add_column("− raw", justify="right", no_wrap=True)
        if metric in compared:
            table.add_column("verdict", no_wrap=True)
    for cell, mode, result in _rows(population):
        cells: list[str | Text] = [cell_name(cell) if mode == RAW else "", mode]
        for metric in metrics:
            value = result.cells[cell].estimate(metric)
            rate = "n/e" if value is None or value.value is None else percent(value.value)
            cells.append(rate + _unreliable(result.false_matches(cell, metric)))
            change = result.difference_to_raw(cell, metric) if metric in compared else None
            known = change is not None and change.value is not None
            if metric in compared and differences:
                cells.append(points(change.value) if change is not None and change.value is not None else "")
            if metric in compared:
                cells.append(plain(verdict(change)) if known and change is not None else "")
        table.add_row(*cells)
    return table


def _coloured(difference: Estimate | None) -> Text:
    """Return a difference whose verdict has its colour."""
    words = _difference(difference)
    if difference is None or not words:
        return Text()
    style = plain(verdict(difference)).style
    head = words.removesuffix(verdict(difference))
    return Text(head) if head == words else Text(head).append(words[len(head) :], style=style)


def _threshold(score: float | None) -> str:
    """Print a threshold rounded up to four decimals, so that its FMR is no larger; JSON has it in full."""
    return "n/e" if score is None else f"{math.ceil(1e4 * score) / 1e4:.4f}"


def _pairs_file(one: PairsResult) -> str:
    accuracy = one.reason or "not estimable"
    if one.accuracy_mean is not None and one.accuracy_sd is not None:
        accuracy = f"{one.n_folds}-fold accuracy {100 * one.accuracy_mean:.2f} ± {100 * one.accuracy_sd:.2f}%"
    remarks = "".join(f"; {remark}" for remark in pairs_remarks(one))
    return f"{one.protocol}: {accuracy} over {one.n_pairs:,} pairs{remarks}"


def _identification(found: IdentificationResult) -> str:
    ranks = ", ".join(f"rank-{rank} {rate_of(rate)}%" for rank, rate in found.rank.items())
    misses = "; ".join(
        f"FNIR @ FPIR {fpir} {'n/e' if rate.value is None else f'{_with_interval(rate)}%'}"
        for fpir, rate in found.fnir.items()
    )
    return (
        f"{found.gallery} gallery ({found.n_gallery_subjects:,} subjects), {found.probes} probes "
        f"({found.n_mated:,} mated, {found.n_non_mated:,} non-mated): {ranks}; {misses}"
    )


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None or estimate.value is None:
        return "n/e"
    between = interval(estimate, ", ")
    return percent(estimate.value) + (f" [{between}]" if between else "")


def _unreliable(false_matches: int | None) -> str:
    return " (few)" if is_unreliable(false_matches) else ""


def _difference(difference: Estimate | None) -> str:
    if difference is None or difference.value is None:
        return ""
    between = points_interval(difference, ", ")
    if not between:
        return points(difference.value)
    return f"{points(difference.value)} [{between}] {verdict(difference)}"


def rate_of(estimate: Estimate | None) -> str:
    """Print a rate in percent, `n/e` where it is not estimable."""
    return "n/e" if estimate is None or estimate.value is None else percent(estimate.value)
