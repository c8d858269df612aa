"""Errors for people: each message names the thing, the value found and what to do.

Every refusal derives from `FrontalisError`; the command line prints its message without a traceback and exits with
`exit_code`. Any other exception is a defect. A message may contain names from the data: it is always one line of
printable characters.
"""

import unicodedata
from enum import IntEnum

# Not printable in a message, a plot or a page, or printable only to deceive: control characters, lone surrogates, and
# marks that change the direction of writing.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"}
MAX_WAIT_SECONDS = 31_536_000.0  # a year, for a run that holds the store


class ExitCode(IntEnum):
    """Exit codes of the command line. A command that was interrupted ends with 128 + the number of the signal."""

    DONE = 0
    FAILED = 1  # the system refused, stdout was lost, `verify` found problems; also a defect
    REFUSED = 2
    BUSY = 3
    BAD_SHARDS = 4
    REJECTED = 5


class FrontalisError(Exception):
    """Base of all refusals. The message is one or two sentences for the person who started the work."""

    exit_code = ExitCode.REFUSED

    def __str__(self) -> str:
        return one_line(super().__str__())


class SettingsError(FrontalisError):
    """A setting, option or argument cannot be used."""


class UnknownIdError(SettingsError):
    """An id is not stored."""


class BadShardError(FrontalisError):
    """A whole shard cannot be used (unreadable file, missing or misnamed column, wrong type)."""


class BadModelError(FrontalisError):
    """A checkpoint is unreadable, hostile, or does not fit the embeddings."""


class StoreError(FrontalisError):
    """The store cannot be read or written, or its content contradicts itself."""


class StoreBusyError(StoreError):
    """Another run has locked the store, or committed first."""

    exit_code = ExitCode.BUSY


class TrainingError(FrontalisError):
    """The training data cannot support a model (too few subjects, no genuine pair, mixed dimensions …)."""


def clipped(value: object) -> str:
    """Return a value from the data as a message shows it: quoted, control characters escaped, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(str(value)):,} characters)"


def first_line(error: BaseException, limit: int = 240) -> str:
    """Return what an error of a library says, without the stack frames that compiled libraries may append."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:limit]


def visible(text: str) -> str:
    r"""Return `text` with unprintable and direction-changing characters escaped (`\u202e`); tab and newline stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        f"\\u{ord(character):04x}"
        if unicodedata.category(character) in _UNPRINTABLE and character not in "\t\n"
        else character
        for character in text
    )


def one_line(text: str) -> str:
    r"""Return `text` on one line of printable characters: as `visible`, with tab and newline as `\t` and `\n`."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")
