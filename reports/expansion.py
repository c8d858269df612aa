"""Query expansion in words and as a table: what it does to 1:N search, and whether to use it on this store."""

from reports.tables import Table, mode_name
from reports.text import Verdict, negated, percent_of, points, points_interval, verdict
from schemas.reports import Estimate, ExpandedRates, ExpansionResult, Population

RANK = "1"


def expansion_table(population: Population) -> tuple[list[str], Table] | None:
    """Build a sentence of advice for each mode, and the table of rates with expansion, by rows enrolled.

    Differences are to the search without expansion. None where no expansion was measured.
    """
    found = {
        mode: result.identification.expansion
        for mode, result in population.modes.items()
        if result.identification and result.identification.expansion
    }
    if not found:
        return None
    first = next(iter(found.values()))
    ranks, fpirs = list(first.groups[0].rank), list(first.groups[0].fnir)
    heads = [f"rank {key}" for key in ranks] + [f"FNIR at FPIR {percent_of(key)}" for key in fpirs]
    table = Table(f"Search with queries expanded by {first.rows} rows", heads)
    for enrolled in dict.fromkeys(group.enrolled for result in found.values() for group in result.groups):
        rows, mated = [], 0
        for mode, result in found.items():
            for group in result.groups:
                if group.enrolled == enrolled:
                    mated = group.n_mated
                    cells = [
                        table.show(group.rank.get(key), group.rank_difference.get(key), higher_is_better=True)
                        for key in ranks
                    ]
                    cells += [table.show(group.fnir.get(key), group.fnir_difference.get(key)) for key in fpirs]
                    rows.append((mode_name(mode, population), cells))
        table.groups.append((_enrolled(enrolled), f"{mated:,} mated probes", rows))
    return [f"{mode}: {expansion_advice(result)}" for mode, result in found.items()], table


def expansion_advice(result: ExpansionResult) -> str:
    """Return whether to use query expansion, and the difference that decides.

    It is advised where rank 1 or FNIR at any FPIR gets significantly better (95% interval of the paired difference),
    and neither gets significantly worse, for all probes together or for those with so many rows enrolled.
    """
    everybody = result.groups[0]
    compared = [(group, name, change, outcome) for group in result.groups for name, change, outcome in _changes(group)]
    for group, name, change, outcome in compared:
        if outcome == "worse":
            whom = "" if group is everybody else f" of subjects with {_enrolled(group.enrolled)}"
            return f"leave it off: {name}{whom} gets worse, by {_points(change)}"
    for group, name, change, outcome in compared:
        if group is everybody and outcome == "better":
            return f"[query] expand = {result.rows} is worth using: {name} gets better, by {_points(change)}"
    if all(outcome == "no interval" for *_, outcome in compared):
        return "leave it off: too few probes to compare"
    return "leave it off: no significant difference"


def _changes(group: ExpandedRates) -> list[tuple[str, Estimate, Verdict]]:
    """Return name, difference and verdict of what decides: FNIR at each FPIR, the smallest first, then rank 1."""
    changes = [
        (f"FNIR at FPIR {percent_of(fpir)}", change, verdict(change))
        for fpir, change in sorted(group.fnir_difference.items(), key=lambda item: float(item[0]))
    ]
    rank = group.rank_difference.get(RANK)
    if rank is not None:
        changes.append((f"the rank-{RANK} rate", rank, verdict(negated(rank))))
    return changes


def _points(change: Estimate) -> str:
    between = points_interval(change)
    value = "n/e" if change.value is None else f"{points(change.value)} points"
    return f"{value} (95% interval {between})" if between else value


def _enrolled(name: str) -> str:
    if name == "any":
        return "all probes"
    return f"{name} row{'' if name == '1' else 's'} enrolled"
