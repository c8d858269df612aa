"""The history of a store on a terminal: one line a release, with its decision in a few words."""

from collections.abc import Sequence

from rich.text import Text

from frontalis.evaluations import rate_of
from frontalis.terminal import fact, new_table, open_console, plain, say, show_table
from reports.text import cell_name, metric_name
from schemas.metrics import ALL
from schemas.releases import Release, anchor_of
from schemas.reports import GateDecision


def print_releases(releases: Sequence[Release], *, wide: bool = False, details: bool = False) -> None:
    """Print the history, newest last; with `details` each decision as the run gave it."""
    console = open_console(wide=wide)
    counts = ("rows", "added", "changed", "removed")
    modes = tuple(dict.fromkeys(mode for release in releases for mode in release.gated))
    full = new_table(
        "release", "created (UTC)", "state", *counts, *modes, "metric, %", "decision", right=counts + modes
    )
    best = modes[1:2] or modes
    medium = new_table("release", "created (UTC)", "state", "rows", *best, "decision", right=("rows", *best))
    small = new_table("release", "created", "state", "decision")
    anchor = anchor_of(releases)
    for release in releases:
        state, decision = _state(release, release is anchor), _decision(release.gate)
        created = f"{release.created:%Y-%m-%d %H:%M}"
        rates = {mode: rate_of(release.gated.get(mode)) if mode in release.gated else "" for mode in modes}
        rows = f"{release.data.rows_features:,}"
        measured = release.gated_name if release.gated else "not measured"
        full.add_row(release.release, created, state, rows, *_changes(release), *rates.values(), measured, decision)
        medium.add_row(release.release, created, state, rows, *(rates[mode] for mode in best), decision)
        small.add_row(release.release, created[5:], state, decision)
    show_table(console, "releases, newest last", full, medium, small, fold_last=True)
    if details:
        for release in releases:
            fact(console, "", "")
            fact(console, "decision", f"{release.release}: {release.gate.sentence}")
    names = dict.fromkeys(release.gated_name for release in releases if release.gated)
    if names:
        say(console, f"{', '.join(names)} in percent, over held-out subjects; n/e: not estimable")
    fact(console, "next:", "frontalis compare R1 R2 | rollback R | anchor R; --details prints the decisions in full")


def _state(release: Release, is_anchor: bool) -> Text:
    gone = "erased" if release.erased else "vacuumed" if release.vacuumed else ""
    words = ", ".join(filter(None, ("served" if release.serving else gone, "anchor" if is_anchor else "")))
    return Text(words, style=str(plain("served").style) if release.serving else "")


def _decision(gate: GateDecision) -> Text:
    word = "promoted" if gate.promoted else "rejected"
    return plain(word).append(Text.assemble((f": {short_reason(gate)}", "not bold default")))


def short_reason(gate: GateDecision) -> str:
    """Return why a release was promoted or rejected, in a few words; `gate.reason` is the whole sentence."""
    if gate.promoted:
        return f"not worse than {gate.compared_with}" if gate.compared_with else gate.reason.split("; ")[0]
    exceeded = [limit for limit in gate.limits if limit.exceeded]
    if exceeded and not gate.removal_allowed:
        worst = max(exceeded, key=lambda limit: limit.share)
        what = worst.setting.removeprefix("max_").removeprefix("removed_")
        return f"{100 * worst.share:.1f}% of {'rows unusable' if what == 'quarantined' else f'{what} removed'}"
    if gate.missing_modes:
        return f"lacks {' and '.join(gate.missing_modes)}"
    for outcome, words in (("worse", "worse than {}"), ("undecided", "too few subjects to compare with {}")):
        for one in gate.judged:
            if one.outcome == outcome:
                cell = "" if one.cell == ALL else f"{cell_name(one.cell)} "
                return f"{one.mode} {cell}{metric_name(one.metric)}: {words.format(one.against)}"
    if gate.compared_with and any(one.outcome == "not compared" for one in gate.judged):
        return f"cannot be compared with {gate.compared_with}"
    return gate.reason.split("; ")[0]


def _changes(release: Release) -> list[str]:
    found = release.gate.changes
    if found is None:
        return ["", "", ""]
    return [f"{rows:,}" for rows in (found.rows_added, found.rows_changed, found.rows_removed)]
