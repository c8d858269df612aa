"""Tables, lines and JSON documents on stdout: what all commands print with.

Ids, subjects and shard names are printed with their control characters written out, so that data cannot move the cursor
or imitate other output.
"""

import sys

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from schemas.errors import one_line


def open_console() -> Console:
    """Return a console on stdout. A pipe has no width: rows there are as long as they are."""
    return Console(width=None if sys.stdout.isatty() else 500, highlight=False, soft_wrap=False)


def new_table(on: Console, title: str) -> Table:
    """Print a title, which is not cut to the width of the table, and return the table to fill."""
    say(on, title)
    return Table(box=None, pad_edge=False, header_style="bold")


def plain(value: object) -> Text:
    """Return a value as one line of printable characters, empty for None."""
    return Text("" if value is None else one_line(str(value)))


def say(on: Console, line: str) -> None:
    """Print one line, whatever the width."""
    on.print(plain(line), soft_wrap=True)


def write_json(record: BaseModel) -> None:
    """Print a record as one JSON document."""
    sys.stdout.write(record.model_dump_json(indent=1) + "\n")
