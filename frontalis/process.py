"""The process of a command: signals, stdout, errors in one line, and exit codes.

A refusal (`FrontalisError`), an interrupt and what the operating system refuses end in one line on stderr and an exit
code (`schemas.errors.ExitCode`). Anything else is a defect, and its traceback is shown.
"""

import atexit
import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

import typer

from frontalis.progress import OneLine, progress_handler, restore_terminal, stop_progress
from schemas.errors import ExitCode, FrontalisError, SettingsError, first_line, one_line
from storage.permissions import restrict_new_files

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt(BaseException):
    """Ctrl-C or SIGTERM. `KeyboardInterrupt` would not do: typer turns it into a silent exit."""


@dataclass
class Command:
    """The command that runs; typer's context holds it as `obj`.

    `kept` says what an interrupt leaves behind, and may be set while the command runs. `signal` is the signal that
    came, if one did.
    """

    kept: str = "nothing was changed"
    signal: int | None = None
    done: bool = False

    def on_signal(self, number: int, _: FrameType | None = None) -> None:
        """Raise `Interrupt` on the first signal. The second one, or one that comes while Python exits, ends at once."""
        if self.signal is not None or self.done:
            _end_children()
            restore_terminal()
            os._exit(128 + number)
        self.signal = number
        raise Interrupt


def run(app: typer.Typer) -> int:
    """Run the command that was typed and return its exit code; the process is to end afterwards.

    Where stdout is lost, because the disk is full or the reader has gone, the command still finishes its work. Its
    success then becomes exit code 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks must not end the work
            stream.reconfigure(errors="backslashreplace")
    stdout = None
    if sys.stdout is not None:  # None: the parent process closed it
        stdout = _Stdout(sys.stdout)
        sys.stdout = cast(TextIO, stdout)
    command = Command()
    for number in SIGNALS:
        signal.signal(number, command.on_signal)
    atexit.register(_end_children)  # before Prefect is imported: it runs after what Prefect does at exit
    try:
        code = _run(app, command)
        command.done = True
    except Interrupt:
        code = _refuse(f"interrupted; {command.kept}", 128 + (command.signal or signal.SIGINT))
    finally:
        stop_progress()
    if stdout is None:
        return code
    stdout.flush()
    if stdout.lost is None or code:
        return code
    if isinstance(stdout.lost, BrokenPipeError):  # the reader has read enough
        return ExitCode.FAILED
    return _refuse(f"stdout cannot be written ({stdout.lost.strerror}); the work itself is done.", ExitCode.FAILED)


def _run(app: typer.Typer, command: Command) -> int:
    try:
        _check_arguments(sys.argv[1:])
        restrict_new_files()
        return int(app(standalone_mode=False, obj=command) or 0)
    except FrontalisError as error:
        return _refuse(str(error), error.exit_code)
    except SystemExit as ended:  # click exits so where a connection breaks
        if isinstance(ended.__context__, OSError):
            return _refuse(
                f"{ended.__context__.strerror}: the other end of a connection has gone; run again.", ExitCode.FAILED
            )
        raise
    except Exception as error:
        if command.signal is not None:  # a consequence of stopping, such as a server that is gone
            raise Interrupt from error
        if show := getattr(error, "show", None):  # typer or click: an option that cannot be used
            show()
            return int(getattr(error, "exit_code", ExitCode.REFUSED))
        if isinstance(error, OSError) and error.strerror:
            file = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
            return _refuse(f"{file}{error.strerror}.", ExitCode.FAILED)
        if isinstance(error, MemoryError):
            return _refuse(f"not enough memory ({first_line(error)}).", ExitCode.FAILED)
        raise


def _check_arguments(arguments: list[str]) -> None:
    """Refuse text that could not be written into settings, records or messages."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise SettingsError(f"{argument}: is no UTF-8; type or name it in UTF-8.")


def _refuse(message: str, code: int) -> int:
    stop_progress()
    print(f"frontalis: {one_line(message)}", file=sys.stderr)  # noqa: T201
    return code


class _Stdout:
    """The stdout of the process; once it is `lost`, what is printed is dropped."""

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

    def _try(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self.lost = self.lost or error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # or Python fails again at exit


def log_to_stderr() -> None:
    """Log to stderr: one line a record, and a bar on a terminal.

    Prefect's own records stay out, because they repeat errors with a traceback, and Matplotlib's about its cache.
    """
    logging.raiseExceptions = False  # or Prefect writes about each log record that its server did not take
    handler = progress_handler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(
        lambda record: not (record.name.startswith(("prefect", "matplotlib")) or "/prefect/" in record.pathname)
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


def _end_children() -> None:
    """End the processes that this one started, such as a Prefect server that nothing else would end any more."""
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in file.read_text().split():
                os.kill(int(child), signal.SIGTERM)
