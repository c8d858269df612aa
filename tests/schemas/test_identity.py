"""Ids and names as people type them: one form each, and everything else refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import SettingsError
from schemas.identity import folded_text, normal_text, parse_id, parse_text


@given(st.integers(-(2**63), 2**63 - 1))
def test_every_64_bit_integer_is_read_from_its_digits(number: int) -> None:
    assert parse_id(str(number), integer=True) == number


@given(st.text(st.sampled_from("0179-+ _.\t٣"), max_size=6))
def test_another_spelling_of_an_integer_is_refused(text: str) -> None:
    try:
        found = parse_id(text, integer=True)
    except SettingsError:
        found = None
    assert found is None or str(found) == text


@pytest.mark.parametrize("text", [str(2**63), str(-(2**63) - 1), "1" * 5000, ""])
def test_what_is_no_64_bit_integer_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="integers of 64 bits"):
        parse_id(text, integer=True)


def test_text_is_compared_composed_and_trimmed() -> None:
    assert parse_id(" Zoe\u0308\n", integer=False) == "Zoë" == normal_text("Zoë")
    assert parse_text("a b ", "--subject") == "a b"
    assert folded_text(" STRASSE ") == folded_text("Straße")
    assert normal_text("Zoë") != normal_text("zoë")
    for empty in ("", " \t"):
        with pytest.raises(SettingsError, match="--subject: is empty"):
            parse_text(empty, "--subject")
    with pytest.raises(SettingsError, match="is no UTF-8"):
        parse_id("\udcff", integer=False)
