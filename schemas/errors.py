"""Errors that a person reads: each message names the thing, the value found and the way out.

Everything refused on purpose derives from `FrontalisError`; the command line prints its message without a traceback
and exits with `exit_code`. Anything else that is raised is a defect.
"""


class FrontalisError(Exception):
    """Base of all refusals. The message is one or two sentences for the person who started the work."""

    exit_code = 2


class SettingsError(FrontalisError):
    """A setting, option or argument cannot be used."""


class BadShardError(FrontalisError):
    """A whole shard cannot be used (unreadable file, missing or misnamed column, wrong type)."""


class BadModelError(FrontalisError):
    """A checkpoint is unreadable, hostile, or does not fit the embeddings."""


class StoreError(FrontalisError):
    """The store cannot be read or written, or its content contradicts itself."""


class StoreBusyError(StoreError):
    """Another run holds the store, or committed first."""

    exit_code = 3


class TrainingError(FrontalisError):
    """The training data cannot support a model (too few subjects, no genuine pair, mixed dimensions …)."""


def clipped(value: object) -> str:
    """Return a value from the data as a message shows it: quoted, control characters written out, not endless."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(str(value)):,} characters)"
