"""Tables, facts and JSON documents on stdout: what all commands print with.

Ids, subjects and shard names are printed with their control characters written out, so that data cannot move the cursor
or imitate other output. No label or verdict is ever cut: where a table is wider than the terminal, a smaller one is
printed instead.
"""

import sys
import textwrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

from frontalis.progress import stop_progress
from schemas.errors import one_line

LABEL = 11  # columns of the label of a fact
ANY_WIDTH = 100_000
STYLES = {
    "better": "green",
    "worse": "bold red",
    "no difference": "dim",
    "no interval": "dim",
    "promoted": "green",
    "rejected": "bold red",
    "served": "green",
    "warning": "yellow",
    "bad shard": "bold red",
    "problem": "bold red",
    "to do": "yellow",
}
"""Colours of verdicts and labels on a terminal; the words say the same without them."""


def open_console(*, wide: bool = False) -> Console:
    """Return a console on stdout, after the progress bar. A pipe has no width: rows there are as long as they are."""
    stop_progress()
    return Console(width=ANY_WIDTH if wide or not sys.stdout.isatty() else None, highlight=False, soft_wrap=False)


def new_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """Return a table to fill; the columns in `right` hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=True)
    return table


def show_table(on: Console, title: str, *tables: Table, fold_last: bool = False) -> None:
    """Print the first of these tables that fits the terminal, or the last one, uncut, below its title.

    Args:
        on: the console.
        title: of the table; printed whole, whatever the width.
        tables: the widest first.
        fold_last: whether the last column of the last table may take several lines.
    """
    say(on, title)
    for table in tables:
        width = on.measure(table, options=on.options.update(width=ANY_WIDTH)).maximum
        if width <= on.width:
            break
    if fold_last and width > on.width:
        last = tables[-1].columns[-1]
        last.no_wrap, last.overflow, width = False, "fold", on.width
    table.width = width
    on.print(table, crop=False)


def plain(value: object) -> Text:
    """Return a value as one line of printable characters, empty for None; a verdict in its colour."""
    text = "" if value is None else one_line(str(value))
    return Text(text, style=STYLES.get(text, ""))


def say(on: Console, line: str) -> None:
    """Print one line, whatever the width."""
    on.print(plain(line), soft_wrap=True)


def fact(on: Console, label: str, text: str, style: str = "") -> None:
    """Print a label and what belongs to it; a terminal gets lines of its width, indented below the first."""
    text = one_line(text)
    room = on.width - LABEL - 1
    lines = [text]
    if 20 <= room < len(text):
        lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    for number, line in enumerate(lines or [""]):
        head = Text(f"{label if number == 0 else '':<{LABEL}}", style=style or STYLES.get(label, ""))
        on.print(head.append(line, style=""), soft_wrap=True)
