"""How a value from the data stands in a message: recognisable, on one line, never endless."""

import pytest

from schemas.errors import BadShardError, FrontalisError, StoreBusyError, clipped


@pytest.mark.parametrize("value", ["part-07", "a\nb\x1b[31m", "'", 17, None, "x" * 70])
def test_a_short_value_is_shown_as_it_is_on_one_line(value: object) -> None:
    shown = clipped(value)
    assert shown == repr(value)
    assert "\n" not in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("value", ["x" * 10_000, "\n" * 10_000, "\x00é" * 5_000])
def test_a_long_value_is_cut_and_its_length_given(value: str) -> None:
    shown = clipped(value)
    assert len(shown) < 100
    assert shown.startswith(repr(value)[:50])
    assert shown.endswith("(10,000 characters)")
    assert shown.isprintable()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[31mPWN\nfake.parquet", r"a\u001b[31mPWN\nfake.parquet"),
        ("\r\tfrontalis: all is well", r"\u000d\tfrontalis: all is well"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("part-\udcff", r"part-\udcff"),
        ("straße/日本 #1", "straße/日本 #1"),
    ],
)
def test_a_name_from_the_data_can_neither_forge_a_line_nor_steer_the_terminal(name: str, shown: str) -> None:
    assert str(BadShardError(f"shard {name}: is bad")) == f"shard {shown}: is bad"


def test_a_busy_store_has_an_exit_code_of_its_own() -> None:
    assert StoreBusyError.exit_code != FrontalisError.exit_code != 0
