"""Progress on stderr: a bar on a terminal, one line a record otherwise.

Both are made of the log. A record with the attributes `stage`, `done` and `total` (None where unknown) moves the bar;
any other record is a line above it. What is worth logging is decided where the work is done.
"""

import logging
import sys
from typing import TYPE_CHECKING

from schemas.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console

SHOW_CURSOR = "\x1b[?25h"


class OneLine(logging.Formatter):
    """Names from the data, such as those of files, can neither forge a line nor steer the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """Return the line, its control characters written out."""
        return one_line(super().formatMessage(record))


class ProgressBar(logging.Handler):
    """Shows the log on a terminal: the stage that is running as a bar, all other records as lines above it."""

    def __init__(self, on: "Console") -> None:
        super().__init__()
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[at]}"),
            TimeElapsedColumn(),
            console=on,
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=None, visible=False, at="")
        self._stage = ""
        self._stopped = False

    def emit(self, record: logging.LogRecord) -> None:
        """Move the bar, or print a line above it."""
        from rich.text import Text

        stage = getattr(record, "stage", None)
        if stage is None or record.levelno >= logging.WARNING:
            style = "yellow" if record.levelno >= logging.WARNING else "dim"
            self._progress.console.print(Text(self.format(record), style=style), soft_wrap=True)
        if stage is None or self._stopped:
            return
        if stage != self._stage:
            self._stage = stage
            self._progress.reset(self._task)
        done, total = getattr(record, "done", None), getattr(record, "total", None)
        at = f"{done:,} of {total:,}" if total else ""
        self._progress.update(self._task, description=stage, completed=done or 0, total=total, at=at, visible=True)
        self._progress.start()

    def close(self) -> None:
        """Remove the bar from the terminal; later records are lines."""
        self._stopped = True
        self._progress.stop()
        super().close()


_bar: list[ProgressBar] = []


def progress_handler() -> logging.Handler:
    """Return the handler that shows progress on stderr: a bar if that is a terminal."""
    if not (sys.stderr and sys.stderr.isatty()):
        return logging.StreamHandler(sys.stderr)
    from rich.console import Console

    _bar.append(ProgressBar(Console(stderr=True, highlight=False)))
    return _bar[-1]


def stop_progress() -> None:
    """Remove the bar, before results are printed and at the end."""
    for bar in _bar:
        bar.close()


def restore_terminal() -> None:
    """Show the cursor again where a process ends at once; safe in a signal handler."""
    if _bar:
        sys.stderr.write(SHOW_CURSOR)
        sys.stderr.flush()
