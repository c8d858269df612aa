"""`frontalis serve`: answer queries over HTTP, and show a page to search by hand."""

import os
from typing import Annotated

import typer

from frontalis.app import Store, a_number, command


@command(kept="nothing was changed")
def serve(
    context: typer.Context,
    store: Store,
    host: Annotated[
        str, typer.Option(help="Address; any that others can reach wants a token in FRONTALIS_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 8000,
    refresh: Annotated[
        float, typer.Option(min=0.05, max=3600, callback=a_number, help="Seconds between looks for a new release.")
    ] = 5.0,
    max_body_mb: Annotated[int, typer.Option(min=1, max=1024, help="Largest request body, in MiB.")] = 16,
    max_queries: Annotated[int, typer.Option(min=1, max=100_000, help="Most ids or vectors a request.")] = 1_000,
    max_k: Annotated[int, typer.Option(min=1, max=10_000, help="Most neighbours a query.")] = 1_000,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=3600, callback=a_number, help="Seconds that a request may take.")
    ] = 30.0,
    audit: Annotated[str | None, typer.Option(help="Append the ids that are asked for to this file.")] = None,
) -> None:
    """Answer queries over HTTP from the served release, and show a page to search by hand."""
    from frontalis.service.app import ServiceSettings
    from frontalis.service.limits import Limits
    from frontalis.service.server import serve as run
    from frontalis.service.server import token_of

    limits = Limits(body=max_body_mb * 2**20, queries=max_queries, k=max_k, seconds=timeout)
    settings = ServiceSettings(store, limits, refresh, audit, token_of(host, os.environ))

    def at_once(number: int) -> None:
        context.obj.done = True
        context.obj.on_signal(number)

    run(settings, host, port, at_once)
