"""`frontalis compare`: two releases side by side."""

from typing import Annotated

import typer

from frontalis.app import AsJson, Store, Wide, command


@command(kept="nothing was changed")
def compare(
    store: Store,
    first: Annotated[str, typer.Argument(help="The release to start from.")],
    second: Annotated[str, typer.Argument(help="The release to compare with it.")],
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """Compare the error rates of two releases, as they were measured when these were made."""
    from frontalis.documents import write_json
    from frontalis.terminal import fact, new_table, open_console, plain, show_table
    from reports.text import cell_name, metric_name, percent, points, points_interval, verdict
    from schemas.metrics import MetricId
    from tasks.evaluation.compared import compare as compare_releases

    found = compare_releases(store, first, second)
    if as_json:
        write_json(found)
        return
    on = open_console(wide=wide)
    changed = ", ".join(found.models_changed) or "none"
    fact(on, "rows", f"{found.rows[0]:,} in {first}, {found.rows[1]:,} in {second}; models changed: {changed}")
    named = ("pose pair", "mode", "metric", first, second)
    full = new_table(*named, "difference, points", "verdict", right=(first, second))
    small = new_table("pose pair", "mode", "metric", "before", "after", "verdict", right=("before", "after"))
    for one in found.rates:
        values = ["n/e" if value is None else percent(value) for value in (one.first, one.second)]
        change = one.difference
        between = points_interval(change, ", ") if change is not None else None
        moved = "" if change is None or change.value is None else points(change.value)
        said = plain(verdict(change)) if change is not None and between else ""
        name = metric_name(MetricId(one.metric))
        labels = (cell_name(one.cell), one.mode)
        full.add_row(*labels, name, *values, moved + (f" [{between}]" if between else ""), said)
        small.add_row(*labels, name.replace("FNMR at global FMR 0.1%", "FNMR@1e-3"), *values, said)
    where = "held-out subjects" if found.population == "held_out" else "all labelled subjects"
    show_table(on, f"{where}: {found.subjects[0]:,} and {found.subjects[1]:,}, in percent", full, small)
    if not found.paired:
        fact(on, "note", f"{second} was not compared with {first} when it was made: differences have no interval")
