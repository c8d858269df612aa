"""Keys of ids: what they are must never change, or every stored index would be lost."""

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.ids import id_keys

TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view()]


def reference(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) & (2**63 - 1)


def test_the_key_of_an_id_is_fixed_for_ever():
    # the XXH3-64 of the empty text is published with the algorithm: 2d06800538d394c2
    assert id_keys(pa.array([""])).tolist() == [0x2D06800538D394C2]


@pytest.mark.parametrize("text_type", TEXT_TYPES, ids=str)
def test_text_is_hashed_as_utf8_whatever_arrow_type_holds_it(text_type):
    ids = ["a", "Zoë", "person/0001.jpg", "", "a" * 300, "名前"]
    keys = id_keys(pa.array(ids, text_type))
    assert keys.dtype == np.int64
    assert keys.tolist() == [reference(text) for text in ids]


@pytest.mark.parametrize("integer_type", [pa.int64(), pa.int32(), pa.uint64()], ids=str)
def test_an_integer_and_its_decimal_digits_are_one_id(integer_type):
    numbers = [0, 17, 2**31 - 1]
    assert id_keys(pa.array(numbers, integer_type)).tolist() == id_keys(pa.array(map(str, numbers))).tolist()


def test_negative_integers_keep_their_sign_in_the_text():
    assert id_keys(pa.array([-(2**63)])).tolist() == [reference("-9223372036854775808")]


def test_chunks_slices_and_empty_arrays():
    ids = pa.array([f"id-{i}" for i in range(10)])
    whole = id_keys(ids)
    assert id_keys(pa.chunked_array([ids.slice(0, 3), ids.slice(3, 0), ids.slice(3)])).tolist() == whole.tolist()
    assert id_keys(ids.slice(4, 3)).tolist() == whole[4:7].tolist()
    assert id_keys(pa.array([], pa.string())).shape == (0,)


@given(st.lists(st.text(), max_size=30))
@settings(max_examples=60, deadline=None)
def test_keys_are_never_negative_and_depend_on_the_id_alone(ids):
    keys = id_keys(pa.array(ids, pa.string()))
    assert (keys >= 0).all()
    assert keys[::-1].tolist() == id_keys(pa.array(ids[::-1], pa.string())).tolist()


def test_null_ids_and_other_types_are_refused():
    with pytest.raises(ValueError, match="1 of 2 ids are null"):
        id_keys(pa.array(["a", None]))
    with pytest.raises(TypeError, match="not double"):
        id_keys(pa.array([1.5]))
