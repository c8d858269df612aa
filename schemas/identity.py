"""Ids and subject names as people type them: one rule for queries, erasure and lists of training subjects.

Text is compared after NFC normalisation and without blanks at either end. Integer ids are the decimal digits of a
64-bit integer and nothing else, so that `007` never stands for 7 in one command and for nothing in another.
"""

import re
import unicodedata

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import SettingsError, clipped

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")


def normal_text(value: str) -> str:
    """Return text as it is compared: NFC, without blanks at either end."""
    return unicodedata.normalize("NFC", value).strip()


def folded_text(value: str) -> str:
    """Return text as it is compared where case is ignored."""
    return unicodedata.normalize("NFC", normal_text(value).casefold())


def normal_texts(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return a column of text as `normal_text` would each value."""
    return pc.utf8_trim_whitespace(pc.utf8_normalize(column, form="NFC"))


def parse_id(value: str, *, integer: bool, shown: str | None = None) -> int | str:
    """Return a typed id as the store compares it: an int, or normalised text.

    Args:
        value: as typed.
        integer: whether the ids of the store are integers.
        shown: what the message calls it; by default the option and the value.

    Raises:
        SettingsError: it is empty, or the store has integers and it is not one in its usual form.
    """
    shown = shown or f"--id {clipped(value)}"
    if not integer:
        return parse_text(value, shown)
    if _INTEGER.fullmatch(value) is None or not -(2**63) <= int(value) < 2**63:
        raise SettingsError(
            f"{shown}: the ids of this store are integers of 64 bits; write the decimal digits without leading zeros, "
            "plus sign and blanks."
        )
    return int(value)


def parse_text(value: str, shown: str) -> str:
    """Return a typed name or text id as it is compared.

    Raises:
        SettingsError: it is empty, or no text.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:  # typed bytes; no stored text is such
        raise SettingsError(f"{shown}: is no UTF-8.") from error
    if not normal_text(value):
        raise SettingsError(f"{shown}: is empty.")
    return normal_text(value)
