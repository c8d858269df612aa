"""Filters: conditions select the rows that SQL says, and whatever is no condition over columns never reaches polars."""

from datetime import date

import polars as pl
import pytest

from schemas.errors import SettingsError
from tasks.query.where import columns_of, matching

TABLE = pl.DataFrame(
    {
        "id": ["a", "b", "c", "d"],
        "pose": ["profile", "frontal", None, "O'Brien"],
        "yaw": pl.Series([-40.0, 3.0, None, 60.0], dtype=pl.Float32),
        "odd name": [1, 2, 3, 4],
        "day": [date(2026, 1, day) for day in (1, 2, 3, 4)],
    }
)


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("pose = 'profile' and yaw < -30", [0]),
        ("yaw between -50 and 5 or pose is null", [0, 1, 2]),
        ("not (yaw > 0)", [0]),  # null is neither
        ("pose = 'O''Brien'", [3]),
        ("pose in ('frontal', 'profile')", [0, 1]),
        ("pose like 'fr%' or starts_with(pose, 'O')", [1, 3]),
        ('abs(yaw) >= 40 and "odd name" <> 4', [0]),
        ("lower(pose) = 'profile'", [0]),
        ("coalesce(yaw, -1) < 0", [0, 2]),
        ("YAW < 0 OR yaw = 3e0", None),  # columns have one spelling
    ],
)
def test_conditions(condition: str, rows: list[int] | None) -> None:
    if rows is None:
        with pytest.raises(SettingsError, match="'YAW' is no stored column"):
            matching(condition, TABLE)
    else:
        assert matching(condition, TABLE).tolist() == rows


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("id in (select a from read_csv('/etc/passwd'))", "'select' is no stored column"),
        ("yaw > 0 or exists (select 1)", "exists is no function here"),
        ("read_csv('/etc/passwd') = id", "read_csv is no function here"),
        ("regexp_like(id, '(a+)+$')", "regexp_like is no function here"),
        ("count(*) > 1", "count is no function here"),
        ("sum(yaw) over (partition by id) > 1", "sum is no function here"),
        ("yaw > 0; drop table features", "';' at character 8"),
        ("yaw > 0 -- and more", "'-' at character 9"),
        ("yaw > 0 /* */", "'/' at character 9"),
        ("self.yaw > 0", "'self' is no stored column"),
        ("yaw::text = 'x'", "':' at character 4"),
        ("id = 'open", '"\'" at character 6'),
        ("pose = \"front\"", "'front' is no stored column"),
        ("front > 0", "'front' is no stored column; there are id, pose"),
        ("1 = 1", "names no column"),
        ("", "names no column"),
        ("yaw", "gives Float32, not true or false"),
        ("yaw <", "cannot be used"),
        ("pose > 3", "cannot be used"),
        ("day > '\x00'", "cannot be used"),
        ("(" * 400 + "yaw > 1" + ")" * 400, "cannot be used"),
        ("yaw > 1 or " * 100 + "yaw > 1", "has 1,107 characters; 1,000 are read"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(condition: str, says: str) -> None:
    with pytest.raises(SettingsError, match=r"^where ") as refused:
        matching(condition, TABLE)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 500


def test_polars_never_sees_what_is_refused(monkeypatch) -> None:
    """Parsing alone would read the file: polars resolves tables while it parses."""
    monkeypatch.setattr(pl, "sql_expr", lambda condition: pytest.fail("polars was asked"))
    with pytest.raises(SettingsError):
        matching("id in (select a from read_csv('/etc/passwd'))", TABLE)


def test_columns_are_named_once_and_in_order() -> None:
    assert columns_of("yaw > 1 and (pose = 'yaw' or yaw < 0)", TABLE.columns) == ["yaw", "pose"]
