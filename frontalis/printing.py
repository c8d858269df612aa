"""What the commands print: tables for people, or one JSON document.

Ids, subjects and shard names are printed with their control characters written out, so that data cannot move the cursor
or imitate other output.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from frontalis.documents import write_json
from frontalis.evaluations import show_evaluation
from frontalis.terminal import ANY_WIDTH, fact, new_table, open_console, plain, say, show_table
from reports.text import cell_name, changes_in_words, counted, percent, points, points_interval, verdict
from schemas.metrics import ALL, EER, FRONTAL_PROFILE, MAIN_CELLS, RAW, MetricId
from schemas.reports import Evaluation
from schemas.tombstones import Tombstone

if TYPE_CHECKING:
    from tasks.explain import Ablation, Explanation
    from tasks.maintenance.forget import Forgotten
    from tasks.maintenance.vacuum import Vacuumed
    from tasks.maintenance.verify import Checked
    from tasks.outcome import Outcome
    from tasks.training.train import Trained


def print_trained(trained: "Trained", as_json: bool, *, wide: bool = False) -> None:
    """Print whether a new model is better than raw, and its metrics beside raw, on held-out subjects."""
    if as_json:
        card = trained.card.model_dump(mode="json", exclude={"seen_key"})
        write_json({"out": trained.out, "improved": trained.improved, "card": card})
        return
    console = open_console(wide=wide)
    from tasks.training.model_card import change_percent

    part = trained.measured_on or "test"
    subjects = counted(trained.parts[part], f"{part} subject")
    mode = trained.card.mode
    share = trained.choice.best.share
    claim = (
        f"{cell_name(trained.choice.cell)} EER {change_percent(trained.choice.best.eer)} of raw, by "
        f"{trained.chosen_on} on {counted(trained.choice.subjects, 'subject')}"
    )
    if share is None:
        nothing = "no length of the change was better than raw: this model returns raw embeddings"
        fact(console, "rejected", nothing, "bold red")
    elif not trained.improved:
        fact(console, "inconclusive", f"not shown to be better than raw: {claim}", "bold yellow")
    else:
        fact(console, "improved", claim)
    difference = trained.difference.get(FRONTAL_PROFILE) or trained.difference.get(ALL, {})
    cell = cell_name(FRONTAL_PROFILE if FRONTAL_PROFILE in trained.difference else ALL)
    change = difference.get(EER)
    if change is not None and change.value is not None:
        fact(console, verdict(change), f"{cell} EER {points(change.value)} points against raw, on {subjects}")
    rates = {EER: "EER %", MetricId("fnmr_global@1e-2"): "FNMR@1e-2 %", MetricId("fnmr_global@1e-3"): "FNMR@1e-3 %"}
    few = {name: title for name, title in rates.items() if name != MetricId("fnmr_global@1e-2")}
    full = new_table("pose pair", "mode", *rates.values(), "EER − raw, points", "verdict", right=tuple(rates.values()))
    small = new_table("pose pair", "mode", *few.values(), "verdict", right=tuple(few.values()))
    for cell in MAIN_CELLS:
        for name, cells in trained.rates.items():
            if cell not in cells:
                continue
            found = trained.difference.get(cell, {}).get(EER) if name != RAW else None
            known = found if found is not None and found.value is not None else None
            said = plain(verdict(known)) if known else ""
            label = cell_name(cell) if name == RAW else ""
            shown = {metric: _percent(cells[cell][metric]) for metric in rates}
            between = points_interval(known, ", ") if known else None
            moved = "" if known is None or known.value is None else points(known.value)
            moved += f" [{between}]" if between else ""
            full.add_row(label, name, *shown.values(), moved, said)
            small.add_row(label, name, *(shown[metric] for metric in few), said)
    show_table(console, f"{mode} on {subjects}; FNMR at one global threshold per mode", full, small)
    chosen = f"step {trained.steps}, change scaled by {0 if share is None else share:g}"
    fact(console, "model", f"{trained.out}, {chosen}, card {trained.out}.md")
    way = f"frontalis reprocess --source SOURCE --store STORE --model {mode}={trained.out}"
    fact(console, "next:", way if trained.improved else "train on more subjects or views, or with more --steps")


def print_outcome(outcome: "Outcome", as_json: bool, *, wide: bool = False, details: bool = False) -> None:
    """Print the outcome of a run: the decision, what was read and computed, the error rates, what to do next."""
    if as_json:
        write_json(outcome)
        return
    console = open_console(wide=wide)
    data = outcome.data
    decision(console, outcome.status, outcome.release, outcome.reason)
    for fault in data.bad_shards:
        kept = "Its last good features are kept." if fault.kept else "None of its rows are in the release."
        fact(console, "bad shard", f"{fault.reason} {kept}")
    for warning in outcome.warnings:
        fact(console, "warning", warning)
    quarantined = ", ".join(f"{count:,} {reason}" for reason, count in data.quarantined.items()) or "none"
    fact(
        console,
        "rows",
        f"{data.rows_read:,} read, {data.rows_features:,} with features, quarantined: {quarantined}"
        + (f", {data.forgotten:,} forgotten" if data.forgotten else "")
        + (f", {data.blank_subjects:,} with a blank subject" if data.blank_subjects else ""),
    )
    if outcome.changes is not None:
        fact(console, "changes", changes_in_words(outcome.changes))
    shards = f"{outcome.shards_computed} computed, {outcome.shards_reused} reused, {data.shards} in the release"
    fact(console, "shards", f"{shards}; {outcome.seconds:.1f} s")
    if outcome.evaluation is not None:
        show_evaluation(console, outcome.evaluation, details=details)
    if outcome.report:
        fact(console, "report", outcome.report)
    fact(console, "next:", _next_step(outcome))


def _next_step(outcome: "Outcome") -> str:
    if outcome.data.bad_shards:
        return "fix or remove the bad shards, then run again"
    if outcome.status == "rejected":
        return f"what is served stays; frontalis compare --store {outcome.store} SERVED {outcome.release}"
    return f"frontalis query --store {outcome.store} --id ID -k 10"


def decision(console: Console, status: str, release: str, reason: str) -> None:
    """Print what was decided: in one line, on a terminal in one line a clause."""
    if console.width >= ANY_WIDTH:
        fact(console, status, f"{release}: {reason}")
        return
    fact(console, status, release)
    for clause in reason.split("; "):
        fact(console, "", clause)


def print_evaluation(evaluation: Evaluation, as_json: bool, *, wide: bool = False, details: bool = False) -> None:
    """Print the table of modes of every population."""
    if as_json:
        write_json(evaluation)
        return
    console = open_console(wide=wide)
    show_evaluation(console, evaluation, details=details)
    fact(console, "next:", "--details adds thresholds, 1:N search, all populations and indexes; --wide all intervals")


def print_explanation(explanation: "Explanation", as_json: bool) -> None:
    """Print the top channels of every branch, and what the weights are worth."""
    from tasks.explain import ablation_document

    if as_json:
        weights = [one.model_dump(mode="json") for one in explanation.weights]
        document = {"weights": weights, "identity_related": explanation.related, "files": explanation.files}
        document |= {"view_related": explanation.changing, "rank_correlation": explanation.correlation}
        ablation = explanation.ablation
        write_json({**document, "ablation": None if ablation is None else ablation_document(ablation)})
        return
    console = open_console()
    for one in explanation.weights:
        columns = ("channel", "weight", "spread")
        table = new_table(*columns, right=columns)
        for channel, weight in one.top:
            table.add_row(str(channel), f"{weight:.4f}", f"{one.spread[channel]:.4f}")
        show_table(console, f"{one.mode}, {one.branch} branch: channels of largest mean weight", table)
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
    if explanation.ablation is not None:
        _show_ablation(console, explanation.ablation)
    for file in explanation.files:
        say(console, f"wrote      {file}")


def _show_ablation(console: Console, ablation: "Ablation") -> None:
    from tasks.explain import ABLATION_RATES
    from tasks.training.model_card import change_percent

    table = new_table("SE weights", "EER", "FNMR@1e-2", "FNMR@1e-3", right=("EER", "FNMR@1e-2", "FNMR@1e-3"))
    for name, found in ablation.changes.items():
        table.add_row(name, *(change_percent(found[metric]) for metric in ABLATION_RATES))
    title = f"{cell_name(ablation.cell)}, change of raw, {counted(ablation.subjects, 'held-out subject')}"
    show_table(console, title, table)
    say(console, ablation.text)


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
        write_json({"tombstones": [one.model_dump(mode="json", exclude={"undone"}) for one in tombstones]})
        return
    console = open_console()
    if not tombstones:
        say(console, "nobody is forgotten")
        return
    table = new_table("hash", "kind", "added", "rows", right=("rows",))
    for one in tombstones:
        kind = (one.kind or "unknown").replace("_", " ")
        table.add_row(one.mark, kind, one.time or "unknown", "unknown" if one.rows is None else f"{one.rows:,}")
    show_table(console, counted(len(tombstones), "tombstone"), table)


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


def _percent(rate: float | None) -> str:
    return "n/e" if rate is None else percent(rate)
