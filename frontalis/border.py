"""What leaves the command line when something goes wrong: one line on stderr and an exit code, never a traceback.

Refusals come as `FrontalisError`, an interrupt as `Interrupt`; what the operating system refuses is put into words
here. Anything else is a defect, and its traceback is shown.
"""

import logging
import os
import sys

import typer

from frontalis.interrupt import Interrupt, Watched, stops_within
from schemas.errors import FrontalisError, SettingsError, one_line

FAILED = 1


def run(app: typer.Typer) -> int:
    """Run the command that was typed and return its exit code. The command finds its `Watched` as the context's `obj`.

    Refused are arguments that are no UTF-8. Whoever closes the pipe of the output has read enough: that is told by the
    exit code only.
    """
    try:
        with stops_within() as watched:
            return _run(app, watched)
    except Interrupt as interrupt:
        return _refuse(f"interrupted; {watched.kept()}", interrupt.exit_code)


def log_to_stderr() -> None:
    """Let log lines go to stderr, each on one line, but none of Prefect: what it says of a failed run is the error
    again, with a traceback."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(lambda record: not record.name.startswith("prefect"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


def _run(app: typer.Typer, watched: Watched) -> int:
    try:
        _check_words(sys.argv[1:])
        status = app(standalone_mode=False, obj=watched)
        sys.stdout.flush()
        return int(status or 0)
    except FrontalisError as error:
        return _refuse(str(error), error.exit_code)
    except Exception as error:
        if watched.signal is not None:  # what came of ending in the middle, such as a server that is gone
            raise Interrupt(watched.signal) from error
        if show := getattr(error, "show", None):  # an option that cannot be used, of typer's or click's kind
            show()
            return int(getattr(error, "exit_code", 2))
        if isinstance(error, OSError):
            return _system_refused(error)
        raise


def _check_words(words: list[str]) -> None:
    """Refuse what could not be written into settings, records or messages."""
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise SettingsError(f"{word}: is no UTF-8; type or name it in UTF-8.")


def _system_refused(error: OSError) -> int:
    if error.filename is not None:
        return _refuse(f"{os.fsdecode(error.filename)}: {error.strerror}.", FAILED)
    try:
        print(flush=True)  # noqa: T201 - whether it is stdout that cannot be written
    except OSError as lost:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python finds it again at exit
        if isinstance(lost, BrokenPipeError):
            return FAILED
        return _refuse(f"stdout cannot be written ({lost.strerror}); the work itself is done.", FAILED)
    raise error


class _OneLine(logging.Formatter):
    """Names from the data, such as those of files, can neither forge a line nor steer the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        return one_line(super().formatMessage(record))


def _refuse(message: str, code: int) -> int:
    print(f"frontalis: {one_line(message)}", file=sys.stderr)  # noqa: T201
    return code
