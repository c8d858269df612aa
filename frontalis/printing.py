"""What the commands print: tables for people, or one JSON document.

Ids, subjects and shard names are printed with their control characters written out, so that data cannot move the cursor
or imitate other output.
"""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from frontalis.terminal import new_table, open_console, plain, say, write_json
from reports.expansion import expansion_advice
from reports.tables import filled
from reports.text import (
    FEW_FALSE_MATCHES,
    cell_name,
    changes_in_words,
    counted,
    interval,
    is_unreliable,
    pairs_remarks,
    percent,
    points,
    points_interval,
    population_name,
    verdict,
)
from schemas.metrics import ALL, EER, FRONTAL_PROFILE, MAIN_CELLS, RAW, MetricId
from schemas.releases import Release, anchor_of
from schemas.reports import Estimate, Evaluation, IdentificationResult, PairsResult, Population
from schemas.tombstones import Tombstone

if TYPE_CHECKING:
    from tasks.explain import Explanation
    from tasks.maintenance.forget import Forgotten
    from tasks.maintenance.vacuum import Vacuumed
    from tasks.maintenance.verify import Checked
    from tasks.outcome import Outcome
    from tasks.training.train import Trained


def print_trained(trained: "Trained", as_json: bool) -> None:
    """Print the metrics of a new model beside raw, on held-out subjects."""
    if as_json:
        card = trained.card.model_dump(mode="json", exclude={"seen_key"})
        sys.stdout.write(json.dumps({"out": trained.out, "improved": trained.improved, "card": card}, indent=1) + "\n")
        return
    console = open_console()
    subjects = trained.parts[trained.measured_on]
    table = new_table(console, f"{trained.card.mode} on {subjects} {trained.measured_on} subjects, in percent")
    for name in ("pose pair", "mode", "EER", "FNMR @ global FMR 1e-2", "FNMR @ global FMR 1e-3", "EER − raw, points"):
        table.add_column(name, justify="left" if name in ("pose pair", "mode") else "right")
    shown = (EER, MetricId("fnmr_global@1e-2"), MetricId("fnmr_global@1e-3"))
    for cell in MAIN_CELLS:
        for mode, cells in trained.rates.items():
            if cell in cells:
                values = [cells[cell][name] for name in shown]
                change = _difference(trained.difference.get(cell, {}).get(EER)) if mode != RAW else ""
                table.add_row(
                    cell_name(cell), mode, *("n/e" if one is None else percent(one) for one in values), change
                )
    console.print(table)
    if not trained.improved:
        worse = "is WORSE than raw; do not serve it" if trained.best.score > 0 else "returns raw embeddings"
        say(console, f"WARNING    no step was better than raw on validation: this model {worse}")
    chosen = f"step {trained.best.step}, change scaled by {trained.best.share:g}"
    say(console, f"model      {trained.out}, {chosen}, card {trained.out}.md")


def print_outcome(outcome: "Outcome", as_json: bool) -> None:
    """Print the outcome of a run."""
    if as_json:
        write_json(outcome)
        return
    console = open_console()
    if outcome.evaluation is not None:
        _evaluation(console, outcome.evaluation)
    data = outcome.data
    quarantined = ", ".join(f"{count:,} {reason}" for reason, count in data.quarantined.items()) or "none"
    say(console, f"release    {outcome.release}: {outcome.status}: {outcome.reason}")
    say(
        console,
        f"shards     {outcome.shards_computed} computed, {outcome.shards_reused} reused, {data.shards} in the release",
    )
    say(
        console,
        f"rows       {data.rows_read:,} read, {data.rows_features:,} with features, quarantined: {quarantined}"
        + (f", {data.forgotten:,} forgotten" if data.forgotten else "")
        + (f", {data.blank_subjects:,} with a blank subject" if data.blank_subjects else ""),
    )
    if outcome.changes is not None:
        say(console, f"changes    {changes_in_words(outcome.changes)}")
    for fault in data.bad_shards:
        kept = "Its last good features are kept." if fault.kept else "None of its rows are in the release."
        say(console, f"bad shard  {fault.reason} {kept}")
    for warning in outcome.warnings:
        say(console, f"warning    {warning}")
    say(console, f"time       {outcome.seconds:.1f} s")
    if outcome.report:
        say(console, f"report     {outcome.report}")


def print_evaluation(evaluation: Evaluation, as_json: bool) -> None:
    """Print the table of modes of every population."""
    if as_json:
        write_json(evaluation)
        return
    _evaluation(open_console(), evaluation)


def print_explanation(explanation: "Explanation", as_json: bool) -> None:
    """Print the top channels of every branch."""
    if as_json:
        weights = [json.loads(one.model_dump_json()) for one in explanation.weights]
        document = {"weights": weights, "identity_related": explanation.related, "files": explanation.files}
        measured = {"view_related": explanation.changing, "rank_correlation": explanation.correlation}
        sys.stdout.write(json.dumps({**document, **measured}) + "\n")
        return
    console = open_console()
    for one in explanation.weights:
        table = new_table(console, f"{one.mode}, {one.branch} branch: channels of largest mean weight")
        for name in ("channel", "weight", "spread"):
            table.add_column(name, justify="right")
        for channel, weight in one.top:
            table.add_row(str(channel), f"{weight:.4f}", f"{one.spread[channel]:.4f}")
        console.print(table)
        if one.agreement is not None:
            say(console, f"rank correlation of weights between members: {one.agreement:+.3f} (0 by chance)")
        correlation = explanation.correlation[one.branch]
        if correlation is not None:
            say(console, f"rank correlation of weight and identity-relatedness: {correlation:+.3f}")
        console.print()
    for what, ranked in (("related to identity", explanation.related), ("dependent on pose", explanation.changing)):
        if ranked:
            channels = ", ".join(f"{channel} ({ratio:.2f})" for channel, ratio in ranked)
            say(console, f"channels most {what} (variance between / within subjects): {channels}")
    for file in explanation.files:
        say(console, f"wrote      {file}")


def print_releases(releases: Sequence[Release], as_json: bool) -> None:
    """Print the history, newest last."""
    if as_json:
        sys.stdout.write(json.dumps([json.loads(release.model_dump_json()) for release in releases]) + "\n")
        return
    console = open_console()
    table = new_table(console, "releases, newest last")
    modes = list(dict.fromkeys(mode for release in releases for mode in release.gated))
    counts = ("rows", "added", "changed", "removed")
    for name in ("release", "created (UTC)", "served", *counts, *modes):
        table.add_column(name, justify="right" if name in (*counts, *modes) else "left")
    table.add_column("metric, %")
    table.add_column("decision", no_wrap=True, overflow="ignore")
    anchor = anchor_of(releases)
    for release in releases:
        gone = "erased" if release.erased else "vacuumed" if release.vacuumed else ""
        served = ", ".join(filter(None, ("served" if release.serving else gone, "anchor" if release is anchor else "")))
        table.add_row(
            release.release,
            f"{release.created:%Y-%m-%d %H:%M}",
            served,
            f"{release.data.rows_features:,}",
            *_changes(release),
            *(_rate(release.gated.get(mode)) for mode in modes),
            release.gated_name if release.gated else "not measured",
            plain(release.gate.sentence),
        )
    console.print(table)
    if releases:
        say(console, "metrics are over held-out subjects; n/e: not estimable")
        say(console, "anchor: no release may be inferior to it; `frontalis anchor RELEASE` moves it")
        say(console, "added, changed, removed: rows, compared with the release that was served before")


def _changes(release: Release) -> list[str]:
    found = release.gate.changes
    if found is None:
        return ["", "", ""]
    return [f"{rows:,}" for rows in (found.rows_added, found.rows_changed, found.rows_removed)]


def print_forgotten(forgotten: "Forgotten", store: str, as_json: bool) -> None:
    """Print what was erased, or with `dry_run` would be, and what is left to do."""
    if as_json:
        write_json(forgotten)
        return
    console, dry = open_console(), forgotten.dry_run
    quarantined = f" and {forgotten.quarantined:,} in quarantine" if forgotten.quarantined else ""
    rows, shards = counted(forgotten.rows, "row"), counted(forgotten.shards, "shard")
    what = f"{rows} with features{quarantined}, in {shards}"
    if not (forgotten.rows or forgotten.quarantined):
        what = f"no row of this {forgotten.kind} is served; future rows are excluded"
    erased, models = ", ".join(forgotten.erased_releases), ", ".join(forgotten.checkpoints)
    lines: list[tuple[object, str]] = [
        (True, f"{'would go ' if dry else 'forgotten'}  {what}"),
        (forgotten.unmatched, f"no match   {counted(forgotten.unmatched, 'target')}: later rows are kept out"),
        (dry and forgotten.in_shards, f"shards     {', '.join(forgotten.in_shards)}"),
        (forgotten.release, f"release    {forgotten.release} is now served"),
        (erased, f"erased     {erased}: {'could' if dry else 'can'} no longer be served"),
        (models, f"models     {models}: trained on this subject, so the name can be tested with the file"),
        (erased and not dry, f"to do      frontalis vacuum --store {store}   (deletes their files)"),
        (models, "to do      train again without the subject, reprocess, vacuum; delete your own copies of the models"),
        (dry, "nothing was changed"),
    ]
    for shown, line in lines:
        if shown:
            say(console, line)


def print_tombstones(tombstones: Sequence[Tombstone], as_json: bool) -> None:
    """Print the tombstones in force: hash, kind, date and rows, never a name."""
    if as_json:
        found = [one.model_dump(mode="json", exclude={"undone"}) for one in tombstones]
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    console = open_console()
    if not tombstones:
        say(console, "nobody is forgotten")
        return
    table = new_table(console, counted(len(tombstones), "tombstone"))
    for name in ("hash", "kind", "added", "rows"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for one in tombstones:
        kind = (one.kind or "unknown").replace("_", " ")
        table.add_row(one.mark, kind, one.time or "unknown", "unknown" if one.rows is None else f"{one.rows:,}")
    console.print(table)


def print_vacuumed(vacuumed: "Vacuumed", as_json: bool) -> None:
    """Print what was removed, or would be."""
    if as_json:
        write_json(vacuumed)
        return
    console = open_console()
    if vacuumed.dry_run:
        for name in vacuumed.files:
            say(console, name)
    say(console, f"kept       {', '.join(vacuumed.kept_releases) or 'no release'}")
    if vacuumed.removed_releases:
        say(console, f"releases   {', '.join(vacuumed.removed_releases)}")
    what = "to remove" if vacuumed.dry_run else "removed  "
    waiting = f"; {vacuumed.waiting:,} more are too recent to remove safely" if vacuumed.waiting else ""
    say(console, f"{what}  {counted(len(vacuumed.files), 'file')}, {vacuumed.bytes / 1e6:,.1f} MB{waiting}")


def print_checked(checked: "Checked", as_json: bool) -> None:
    """Print what is wrong with a store and how to fix it."""
    if as_json:
        write_json(checked)
        return
    console = open_console()
    for problem in checked.problems:
        say(console, f"problem    {problem.thing}: {problem.what}")
        say(console, f"  fix      {problem.remedy}")
    say(
        console,
        f"checked    {counted(len(checked.releases), 'release')}, {counted(checked.files, 'file')}, "
        f"{checked.bytes / 1e6:,.1f} MB, {counted(checked.rows, 'row')}",
    )
    if checked.leftovers:
        size = sum(one.size for one in checked.leftovers) / 1e6
        say(
            console,
            f"leftovers  {counted(len(checked.leftovers), 'file')}, {size:,.1f} MB: `frontalis vacuum` removes them",
        )
    say(console, f"result     {counted(len(checked.problems), 'problem') if checked.problems else 'no problems'}")


def _evaluation(console: Console, evaluation: Evaluation) -> None:
    for population in evaluation.populations.values():
        _population(console, population, evaluation)
    for mode, index in evaluation.indexes.items():
        recall = f"recall@1 {percent(index.recall_at_1)}%, recall@10 {percent(index.recall_at_10)}%"
        found = f"{recall} over {index.queries:,} queries" if index.queries else "exact"
        say(console, f"index      {mode}: {index.kind}, {index.rows:,} rows, {found}")
    for note in evaluation.notes:
        say(console, f"note       {note}")


def _population(console: Console, population: Population, evaluation: Evaluation) -> None:
    _error_rates(console, population, evaluation)
    modes = population.modes
    for mode, result in modes.items():
        exact = ", ".join(f"FMR {fmr}: {'n/e' if at is None else repr(at)}" for fmr, at in result.thresholds.items())
        say(console, f"score >=   {mode}, global {exact}")
    for mode, result in modes.items():
        for other, differences in result.versus_modes.items():
            for cell in (ALL, FRONTAL_PROFILE):
                if cell in differences:
                    eer = _difference(differences[cell].get(EER))
                    say(console, f"modes      {mode} − {other}, {cell_name(cell)} EER, points: {eer}")
    for mode, result in modes.items():
        for one in result.pairs:
            say(console, f"pairs      {mode}, {_pairs_file(one)}")
        if result.identification is not None:
            say(console, f"1:N        {mode}, {_identification(result.identification)}")
            if expansion := result.identification.expansion:
                say(console, f"expansion  {mode}, {expansion.rows} rows: {expansion_advice(expansion)}")
    console.print()


def _error_rates(console: Console, population: Population, evaluation: Evaluation) -> None:
    excluded = f", {population.left_out_subjects:,} excluded" if population.left_out_subjects else ""
    if population.sampled_from_subjects:
        excluded += f", sampled from {population.sampled_from_subjects:,}"
    title = f"{population_name(population)}: {population.n_subjects:,} subjects{excluded}, "
    table = new_table(console, title + f"{population.n_rows:,} rows, {evaluation.release}")
    columns = {EER: "EER %"}
    for fmr in ("1e-2", "1e-3"):
        if fmr in evaluation.fmrs:
            columns[MetricId.at("fnmr_global", fmr)] = f"FNMR % @ global FMR {fmr}"
    compared = {EER: "EER − raw, points", MetricId("fnmr_global@1e-3"): "FNMR @ 1e-3 − raw, points"}
    compared = {metric: name for metric, name in compared.items() if metric in columns and len(population.modes) > 1}
    for name in ["pose pair", "mode", *columns.values(), *compared.values(), "genuine", "impostor"]:
        table.add_column(name, justify="left" if name in ("pose pair", "mode") else "right")
    for cell in sorted(filled(population), key=(*MAIN_CELLS, *filled(population)).index):
        for mode, result in population.modes.items():
            in_cell = result.cells[cell]
            table.add_row(
                cell_name(cell) if mode == RAW else "",
                mode,
                *(
                    _with_interval(in_cell.estimate(metric)) + _unreliable(result.false_matches(cell, metric))
                    for metric in columns
                ),
                *(_difference(result.difference_to_raw(cell, metric)) for metric in compared),
                f"{in_cell.n_genuine:,}",
                f"{in_cell.n_impostor:,}",
            )
        table.add_section()
    console.print(table)
    few = any(
        is_unreliable(result.false_matches(cell, metric))
        for cell in filled(population)
        for result in population.modes.values()
        for metric in columns
    )
    if few:
        say(console, f"(few) {FEW_FALSE_MATCHES}")
    say(console, "FNMR is at one threshold per mode for all pose pairs: the global FMR is over all impostor pairs")


def _pairs_file(one: PairsResult) -> str:
    accuracy = one.reason or "not estimable"
    if one.accuracy_mean is not None and one.accuracy_sd is not None:
        accuracy = f"{one.n_folds}-fold accuracy {100 * one.accuracy_mean:.2f} ± {100 * one.accuracy_sd:.2f}%"
    remarks = "".join(f"; {remark}" for remark in pairs_remarks(one))
    return f"{one.protocol}: {accuracy} over {one.n_pairs:,} pairs{remarks}"


def _identification(found: IdentificationResult) -> str:
    ranks = ", ".join(f"rank-{rank} {_rate(rate)}%" for rank, rate in found.rank.items())
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


def _rate(estimate: Estimate | None) -> str:
    return "n/e" if estimate is None or estimate.value is None else percent(estimate.value)
