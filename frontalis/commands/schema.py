"""`frontalis schema`: the JSON Schemas of what `--json` prints."""

import json
from typing import Annotated

import typer

from frontalis.app import command
from schemas.errors import SettingsError


@command(kept="nothing was changed")
def schema(
    name: Annotated[str | None, typer.Argument(metavar="COMMAND", help="Such as reprocess.")] = None,
) -> None:
    """Print the JSON Schema of what a command prints with --json; of all commands without one."""
    from frontalis.documents import documents, schema_of

    known = documents()
    if name is not None and name not in known:
        raise SettingsError(f"schema {name}: prints no JSON; use one of {', '.join(known)}.")
    found = schema_of(name) if name is not None else {one: schema_of(one) for one in known}
    print(json.dumps(found, indent=1))  # noqa: T201
