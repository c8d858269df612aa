"""Metrics in words and short strings, the same in tables, alternative texts and Markdown.

Shares are printed in percent, differences in percentage points. Every metric here is an error: lower is better.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from schemas.errors import visible as visible
from schemas.metrics import ALL, MetricId
from schemas.reports import FEWEST_FALSE_MATCHES, Changes, Estimate, LimitName, LimitResult, PairsResult, Population

Verdict = Literal["better", "worse", "no difference", "no interval"]

NOT_ESTIMABLE = "n/e"
FEW_FALSE_MATCHES = f"unreliable: rests on fewer than {FEWEST_FALSE_MATCHES} false matches"


def is_unreliable(false_matches: int | None) -> bool:
    """Return whether a metric rests on too few false matches; False where it rests on none."""
    return false_matches is not None and false_matches < FEWEST_FALSE_MATCHES


def percent(share: float) -> str:
    """Print a share in percent, without the sign: two decimals, below 0.1% two significant digits."""
    value = _without_rounding(100 * share)
    if value == 0 or abs(value) >= 0.1 or not np.isfinite(value):
        return minus(f"{value:.2f}" if value else "0")
    return minus(np.format_float_positional(value, precision=2, fractional=False, trim="-"))


def points(difference: float) -> str:
    """Print a difference of shares in percentage points, with its sign: two decimals, more where they would say 0."""
    value = _without_rounding(100 * difference)
    if value == 0 or abs(value) >= 0.005:
        return minus(f"{value:+.2f}" if value else "0")
    return minus(np.format_float_positional(value, precision=1, fractional=False, sign=True, trim="-"))


def relative(share: float) -> str:
    """Print a relative difference in percent, with the sign where it is negative: one decimal."""
    return minus(f"{_without_rounding(100 * share):.1f}%")


def counted(number: int, noun: str) -> str:
    """Print a number with its noun: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _without_rounding(value: float) -> float:
    """No count of pairs makes a rate as small as this; it is the rounding of sums."""
    return 0.0 if abs(value) < 1e-9 else value


def minus(number: str) -> str:
    """Print the true minus sign."""
    return number.replace("-", "\N{MINUS SIGN}")


def interval(estimate: Estimate, separator: str = " to ") -> str | None:
    """Print a 95% interval in percent, or None where there is none."""
    if estimate.low is None or estimate.high is None:
        return None
    return f"{percent(estimate.low)}{separator}{percent(estimate.high)}"


def points_interval(difference: Estimate, separator: str = " to ") -> str | None:
    """Print the 95% interval of a difference in percentage points, or None where there is none."""
    if difference.low is None or difference.high is None:
        return None
    return f"{points(difference.low)}{separator}{points(difference.high)}"


def in_words(estimate: Estimate) -> str:
    """Return an estimate in words for alternative texts: value and interval, or that there is none."""
    if estimate.value is None:
        return "not estimable"
    between = interval(estimate)
    return f"{percent(estimate.value)}%" + (f" (95% interval {between})" if between else "")


def verdict(difference: Estimate) -> Verdict:
    """Classify a difference by its 95% interval: only an interval that excludes zero is a difference."""
    if difference.low is None or difference.high is None:
        return "no interval"
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "no difference"


def negated(difference: Estimate) -> Estimate:
    """Return the difference of what a rate leaves over: of a rate where higher is better, that of the error."""
    if difference.value is None or difference.low is None or difference.high is None:
        return difference
    return Estimate(value=-difference.value, low=-difference.high, high=-difference.low)


def population_name(population: Population) -> str:
    """Name a population for people, with a caveat where leakage cannot be excluded."""
    if population.name == ALL:
        return "all labelled subjects"
    silent = " and ".join(mode for mode, result in population.modes.items() if not result.training_subjects_known)
    return "held-out subjects" + (f" (leakage cannot be excluded for {silent})" if silent else "")


def cell_name(cell: str) -> str:
    """Name a pose-pair cell for people: `frontal-profile` is frontal–profile."""
    if cell == ALL:
        return "all pairs"
    pair = pose_pair(cell)
    return "\N{EN DASH}".join(pair) if pair else cell


def pose_pair(cell: str) -> tuple[str, str] | None:
    """Return the two pose classes of a cell; None for `all`, and where hyphens in a class make the name ambiguous."""
    if cell.count("-") == 1:
        first, second = cell.split("-")
        return first, second
    middle = len(cell) // 2
    if len(cell) % 2 and cell[middle] == "-" and cell[:middle] == cell[middle + 1 :]:
        return cell[:middle], cell[middle + 1 :]
    return None


def metric_name(metric: MetricId) -> str:
    """Name a metric for people: `fnmr_global@1e-3` is FNMR at global FMR 0.1%, `fnmr@1e-3` is that at own FMR 0.1%."""
    if metric.fmr is None:
        return metric.upper()
    return f"FNMR at {'global' if metric.is_global else 'own'} FMR {percent_of(metric.fmr_text)}"


def percent_of(rate: str) -> str:
    """Print a rate given as text (`1e-3`) in percent with its sign (0.1%)."""
    return f"{float(100 * float(rate)):.10g}%"


def pairs_remarks(pairs: PairsResult) -> list[str]:
    """Say which pairs of a protocol were not compared and why, and which of those compared are doubtful."""
    remarks = {
        "excluded: a row has no subject, is not held out, or was not sampled": pairs.left_out,
        "excluded: same id or identical embedding": pairs.copies,
        "skipped: id not in this release": pairs.missing,
        "repeated, each counted": pairs.repeated,
        "contradict the stored subjects or each other; the label of the file is used": pairs.contradicting,
    }
    return [f"{count:,} {what}" for what, count in remarks.items() if count]


def threshold(score: float) -> str:
    """Print a threshold rounded down to seven decimals: scores are 2.4e-7 apart, so it decides every pair alike."""
    return minus(f"{np.floor(1e7 * score) / 1e7:.7f}")


def changes_in_words(changes: Changes) -> str:
    """Say how many rows a release adds, changes and removes."""
    rows = f"{changes.rows_added:,} added, {changes.rows_changed:,} changed, {changes.rows_removed:,} removed"
    return f"{rows} since {changes.since}"


def removal_sentence(
    exceeded: Sequence[LimitResult], missing_modes: Sequence[str], since: str | None, *, allowed: bool
) -> str:
    """Say what is missing in a release, which limits that exceeds, and the way out.

    Args:
        exceeded: the limits that are exceeded.
        missing_modes: served modes that the run lacks.
        since: the served release; None for a first release.
        allowed: whether the run was allowed to exceed the limits.
    """
    parts = []
    if exceeded:
        limits = ", ".join(f"{limit.setting} = {limit.limit:g}" for limit in exceeded)
        way_out = "passed by --allow-removal" if allowed else "fix the source, pass --allow-removal once, or raise it"
        parts.append(f"{_missing_in_words(exceeded, since)}, more than [gate] {limits} allows; {way_out}")
    if missing_modes:
        names, options = " and ".join(missing_modes), " ".join(f"--drop-mode {mode}" for mode in missing_modes)
        parts.append(f"{since} serves {names}, which this run lacks; pass the model, or {options}")
    return "; ".join(parts)


def _missing_in_words(exceeded: Sequence[LimitResult], since: str | None) -> str:
    removed, parts = [], []
    for limit in exceeded:
        share = f"{limit.count:,} of {limit.total:,} {_COUNTED[limit.setting]} ({_one_decimal(limit.share)})"
        if limit.setting == "max_quarantined":
            before = f" ({_one_decimal(limit.share_before)} in {since})" if since else ""
            parts.append(f"{share} cannot be used{before}")
        else:
            removed.append(share)
    return " and ".join([f"{_listed(removed)} of {since} would be removed", *parts] if removed else parts)


_COUNTED: dict[LimitName, str] = {
    "max_removed_rows": "rows",
    "max_removed_shards": "shards",
    "max_removed_subjects": "labelled subjects",
    "max_quarantined": "rows of the source",
}


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _one_decimal(share: float) -> str:
    return f"{100 * share:.1f}%"
