"""What leaves the command line when something goes wrong: one line on stderr and an exit code, never a traceback.

Refusals come as `FrontalisError`, an interrupt as `Interrupt`; what the operating system refuses is put into words
here. Anything else is a defect, and its traceback is shown.
"""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast

import typer

from frontalis.interrupt import Interrupt, Watched, stops_within
from schemas.errors import FrontalisError, SettingsError, one_line

FAILED = 1


def run(app: typer.Typer) -> int:
    """Run the command that was typed and return its exit code. The command finds its `Watched` as the context's `obj`.

    Refused are arguments that are no UTF-8. Where stdout is lost, on a full disk or because its reader has gone, the
    work goes on; a success then becomes a failure.
    """
    stdout = None
    if sys.stdout is not None:  # else it was closed by whoever started the process
        stdout = _Stdout(sys.stdout)
        sys.stdout = cast(TextIO, stdout)
    try:
        with stops_within() as watched:
            code = _run(app, watched)
    except Interrupt as interrupt:
        code = _refuse(f"interrupted; {watched.said()}", interrupt.exit_code)
    if stdout is None:
        return code
    stdout.flush()
    if stdout.lost is None or code:
        return code
    if isinstance(stdout.lost, BrokenPipeError):  # the reader has read enough
        return FAILED
    return _refuse(f"stdout cannot be written ({stdout.lost.strerror}); the work itself is done.", FAILED)


def log_to_stderr() -> None:
    """Let log lines go to stderr, each on one line, but none of Prefect: what it says of a failed run is the error
    again, with a traceback."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(lambda record: not record.name.startswith("prefect"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


class _Stdout:
    """The stdout of the process; once it is `lost`, what is printed goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, what: Callable[[], object]) -> None:
        try:
            what()
        except OSError as error:
            self.lost = self.lost or error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # or Python finds it again at exit


def _run(app: typer.Typer, watched: Watched) -> int:
    try:
        _check_words(sys.argv[1:])
        return int(app(standalone_mode=False, obj=watched) or 0)
    except FrontalisError as error:
        return _refuse(str(error), error.exit_code)
    except SystemExit as ended:  # so the library that reads the command line ends where a connection breaks
        if isinstance(ended.__context__, OSError):
            return _refuse(f"{ended.__context__.strerror}: whoever was talked to is gone; run again.", FAILED)
        raise
    except Exception as error:
        if watched.signal is not None:  # what came of ending in the middle, such as a server that is gone
            raise Interrupt(watched.signal) from error
        if show := getattr(error, "show", None):  # an option that cannot be used, of typer's or click's kind
            show()
            return int(getattr(error, "exit_code", 2))
        if isinstance(error, OSError) and error.strerror:
            what = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
            return _refuse(f"{what}{error.strerror}.", FAILED)
        raise


def _check_words(words: list[str]) -> None:
    """Refuse what could not be written into settings, records or messages."""
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise SettingsError(f"{word}: is no UTF-8; type or name it in UTF-8.")


class _OneLine(logging.Formatter):
    """Names from the data, such as those of files, can neither forge a line nor steer the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        return one_line(super().formatMessage(record))


def _refuse(message: str, code: int) -> int:
    print(f"frontalis: {one_line(message)}", file=sys.stderr)  # noqa: T201
    return code
