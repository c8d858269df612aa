"""The command line's app: options that commands share, and what is set before any of them runs.

A command registers itself with `command`, here or in a module of `frontalis.commands`, which `frontalis.cli` imports.
"""

import logging
import math
import os
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from frontalis.process import log_to_stderr
from frontalis.server import REQUEST_RETRIES
from schemas.errors import MAX_WAIT_SECONDS

Function = TypeVar("Function", bound=Callable[..., None])

app = typer.Typer(
    name="frontalis",
    help="Re-weight face embeddings, measure whether it helped, serve the result.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def a_number(value: float | None) -> float | None:
    """Refuse NaN, which is neither below a minimum nor above a maximum."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is no number.")
    return value


Store = Annotated[str, typer.Option("--store", help="The store: a folder or s3://bucket/prefix.")]
WAIT = typer.Option(min=0, max=MAX_WAIT_SECONDS, callback=a_number, help="Seconds to wait for another run.")
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Wide = Annotated[bool, typer.Option("--wide", help="All columns, however narrow the terminal is.")]
Details = Annotated[bool, typer.Option("--details", help="Print all that is known, not only what decides.")]

kept_by: dict[str, str] = {}
"""What an interrupt leaves of the work of each command."""


def command(kept: str, name: str | None = None) -> Callable[[Function], Function]:
    """Register a command, and say what an interrupt leaves of its work."""

    def register(function: Function) -> Function:
        kept_by[name or function.__name__] = kept
        return app.command(name)(function)

    return register


def _print_version(value: bool) -> None:
    if value:
        from frontalis import __version__

        print(f"frontalis {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _start(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr, only warnings.")] = False,
) -> None:
    context.obj.kept = kept_by[str(context.invoked_subcommand)]
    log_to_stderr()
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    logging.getLogger("frontalis").setLevel(logging.WARNING if quiet else logging.INFO)
    # Prefect's own log would repeat ours; the server keeps its record of the run all the same.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")  # `run_flow` names a server that is lost
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", str(REQUEST_RETRIES))
    # Nothing leaves the machine, usage statistics included.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
