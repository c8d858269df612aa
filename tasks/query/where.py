"""Filters over stored columns, written as the condition of an SQL WHERE clause: `pose = 'profile' and yaw < -30`.

polars parses the condition, but its SQL knows tables, files and subqueries, and reads a file while it parses. So the
condition is first cut into tokens, and anything but columns of the store, literals, operators and a few functions is
refused before polars sees it.
"""

import re
from collections.abc import Collection

import numpy as np
import polars as pl

from schemas.errors import SettingsError, clipped, first_line

MAX_LENGTH = 1000  # of a condition; polars needs 0.1 s for one of 90 comparisons
WORDS = frozenset(["and", "or", "not", "in", "is", "null", "like", "ilike", "between", "true", "false"])
FUNCTIONS = frozenset(["abs", "lower", "upper", "length", "starts_with", "ends_with", "coalesce"])
_TOKEN = re.compile(
    r"""\s+
    |(?P<text>'(?:[^']|'')*')
    |(?P<quoted>"[^"]+")
    |(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<name>[^\W\d]\w*)
    |(?P<operator><>|!=|<=|>=|\|\||[-+*/%=<>(),])""",
    re.VERBOSE,
)


def columns_of(condition: str, known: Collection[str]) -> list[str]:
    """Return the columns that a condition names, in order, after checking each of its tokens.

    Args:
        condition: such as `pose = 'profile' and (yaw < -30 or yaw is null)`. Column names may be in double quotes.
        known: the columns that there are.

    Raises:
        SettingsError: too long, a token that has no place in a condition, a name that is no column, or no column.

    >>> columns_of("lower(pose) = 'profile' and yaw < -30", ["pose", "yaw"])
    ['pose', 'yaw']
    """
    shown = f"where {clipped(condition)}"
    if len(condition) > MAX_LENGTH:
        raise SettingsError(f"{shown}: has {len(condition):,} characters; {MAX_LENGTH:,} are read.")
    found: dict[str, None] = {}
    at = 0
    while at < len(condition):
        token = _TOKEN.match(condition, at)
        if token is None or condition.startswith(("--", "/*"), at):
            raise SettingsError(f"{shown}: {clipped(condition[at])} at character {at + 1} has no place in a condition.")
        at = token.end()
        if token.lastgroup not in ("name", "quoted"):
            continue
        name = token[0].strip('"')
        if token.lastgroup == "name":
            called = condition[at:].lstrip().startswith("(")
            if name.lower() in WORDS or (called and name.lower() in FUNCTIONS):
                continue
            if called:
                raise SettingsError(f"{shown}: {name} is no function here; use {', '.join(sorted(FUNCTIONS))}.")
        if name not in known:
            raise SettingsError(f"{shown}: {clipped(name)} is no stored column; there are {', '.join(known)}.")
        found[name] = None
    if not found:
        raise SettingsError(f"{shown}: names no column; there are {', '.join(known)}.")
    return list(found)


def matching(condition: str, table: pl.DataFrame) -> np.ndarray:
    """Return the numbers of the rows for which a condition is true; where it is null, a row does not match.

    Args:
        condition: one that `columns_of` accepts for the columns of `table`.
        table: the columns that it names.

    Raises:
        SettingsError: it is no condition, or compares values of types that cannot be compared.
    """
    columns_of(condition, table.columns)
    try:
        found = table.select(pl.sql_expr(condition)).to_series()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OverflowError) as error:
        raise SettingsError(f"where {clipped(condition)}: cannot be used ({first_line(error, 120)}).") from error
    if found.dtype != pl.Boolean or len(found) != len(table):
        raise SettingsError(f"where {clipped(condition)}: gives {found.dtype}, not true or false; compare the column.")
    return np.flatnonzero(found.fill_null(value=False).to_numpy())
