"""`frontalis status`: what a store serves, and what an operator must do. Its exit code is for monitoring."""

from typing import Annotated

import typer

from frontalis.app import AsJson, Store, a_number, command
from schemas.errors import ExitCode


@command(kept="nothing was changed")
def status(
    store: Store,
    max_age: Annotated[
        float | None,
        typer.Option(min=0, max=1_000_000, callback=a_number, help="Hours that the served release may be old."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is served, how old it is, what it takes, and what to do; exit code 1 where there is something to do."""
    from frontalis.documents import write_json
    from frontalis.terminal import fact, open_console
    from reports.text import counted
    from tasks.maintenance.status import status as look

    found = look(store, max_age_hours=max_age)
    if as_json:
        write_json(found)
    else:
        on = open_console()
        if found.served is not None:
            fact(on, "served", f"{found.served}, {counted(found.rows, 'row')}, made {found.age_hours:.1f} h ago")
            fact(on, "decision", str(found.decision))
        if found.latest != found.served:
            fact(on, "latest", f"{found.latest}: {found.latest_decision}")
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in found.quarantined.items())
        fact(on, "quarantine", reasons or "no row")
        parts = ", ".join(f"{part} {size / 1e6:,.1f}" for part, size in found.bytes.items())
        total = sum(found.bytes.values()) / 1e6
        fact(on, "disk", f"{total:,.1f} MB in {counted(found.releases, 'release')}: {parts}")
        for what in found.to_do:
            fact(on, "to do", what)
        if not found.to_do:
            fact(on, "to do", "nothing", "green")
    if found.to_do:
        raise typer.Exit(ExitCode.FAILED)
