"""Columns as arrays: every form of an embedding gives the same matrix, and each bad row its reason."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.shards import Reason, kept_type
from storage.columns import angle_column, embedding_matrix, known_subjects, plain_column

DIM = 6
# Halves and quarters are exact in float16, so that every form can be compared to the bit.
ROWS = (np.random.default_rng(3).integers(-40, 40, (7, DIM)) / 4 + 0.25).astype(np.float32)


def fixed(kind: pa.DataType) -> pa.Array:
    values = pa.array(ROWS.reshape(-1).astype(kind.to_pandas_dtype()), kind)
    return pa.FixedSizeListArray.from_arrays(values, DIM)


def lists(kind: pa.DataType, outer=pa.list_) -> pa.Array:
    return fixed(kind).cast(outer(kind))


def tensors() -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [2, DIM // 2]), fixed(pa.float32()))


def binaries() -> pa.Array:
    return pa.array([row.astype("<f4").tobytes() for row in ROWS], pa.binary(DIM * 4))


FORMS = {
    **{f"fixed_size_list<{kind}>": fixed(kind) for kind in (pa.float16(), pa.float32(), pa.float64())},
    **{f"list<{kind}>": lists(kind) for kind in (pa.float16(), pa.float32(), pa.float64())},
    **{f"large_list<{kind}>": lists(kind, pa.large_list) for kind in (pa.float16(), pa.float32(), pa.float64())},
    "fixed_shape_tensor": tensors(),
    "fixed_size_binary": binaries(),
}
forms = pytest.mark.parametrize("column", FORMS.values(), ids=FORMS.keys())


def with_null(column: pa.Array, at: int) -> pa.Array:
    """The column with one row null, the bytes below it as they were."""
    storage = column.storage if isinstance(column, pa.ExtensionArray) else column
    mask = pa.array([row == at for row in range(len(column))])
    if pa.types.is_fixed_size_binary(storage.type):
        valid = np.packbits([row != at for row in range(len(column))], bitorder="little").tobytes()
        return pa.Array.from_buffers(storage.type, len(storage), [pa.py_buffer(valid), storage.buffers()[1]])
    if pa.types.is_fixed_size_list(storage.type):
        made = pa.FixedSizeListArray.from_arrays(storage.values, DIM, mask=mask)
    else:
        made = type(storage).from_arrays(storage.offsets, storage.values, mask=mask)
    return made if storage is column else pa.ExtensionArray.from_storage(column.type, made)


@forms
def test_every_form_gives_the_same_matrix(column: pa.Array) -> None:
    matrix, reasons = embedding_matrix(column, DIM)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, ROWS)
    assert reasons.tolist() == [None] * len(ROWS)


@forms
@pytest.mark.parametrize(("start", "length"), [(2, 3), (6, 1), (3, 0), (7, 0)])
def test_a_slice_gives_its_own_rows(column: pa.Array, start: int, length: int) -> None:
    matrix, reasons = embedding_matrix(column.slice(start, length), DIM)
    np.testing.assert_array_equal(matrix, ROWS[start : start + length])
    assert matrix.shape == (length, DIM)
    assert len(reasons) == length


@forms
@pytest.mark.parametrize("start", [0, 2])
def test_a_null_row_moves_no_other(column: pa.Array, start: int) -> None:
    matrix, reasons = embedding_matrix(with_null(column, 3).slice(start), DIM)
    others = [row for row in range(start, len(ROWS)) if row != 3]
    assert reasons.tolist() == [Reason.NULL_EMBEDDING if row == 3 else None for row in range(start, len(ROWS))]
    np.testing.assert_array_equal(matrix[[row - start for row in others]], ROWS[others])


@pytest.mark.parametrize("form", ["fixed_size_list<float>", "fixed_shape_tensor", "fixed_size_binary", "list<float>"])
def test_float32_is_not_copied(form: str) -> None:
    column = FORMS[form]
    storage = column.storage if isinstance(column, pa.ExtensionArray) else column
    there = storage.buffers()[-1]
    matrix, _ = embedding_matrix(column, DIM)
    assert there.address <= matrix.__array_interface__["data"][0] < there.address + there.size


@forms
def test_another_length_is_wrong_in_every_row(column: pa.Array) -> None:
    matrix, reasons = embedding_matrix(with_null(column, 1), DIM + 1)
    assert matrix.shape == (len(ROWS), DIM + 1)
    assert reasons.tolist() == [Reason.NULL_EMBEDDING if row == 1 else Reason.WRONG_LENGTH for row in range(len(ROWS))]


@pytest.mark.parametrize("outer", [pa.list_, pa.large_list])
def test_lists_of_free_length_are_checked_row_by_row(outer) -> None:
    rows = [[1.0, 2.0], [], [3.0], None, [4.0, 5.0, 6.0], [7.0, 8.0], [9.0, None]]
    matrix, reasons = embedding_matrix(pa.array(rows, outer(pa.float32())), 2)
    wrong, null, infinite = Reason.WRONG_LENGTH, Reason.NULL_EMBEDDING, Reason.NOT_FINITE
    assert reasons.tolist() == [None, wrong, wrong, null, wrong, None, infinite]
    np.testing.assert_array_equal(matrix[[0, 5]], [[1, 2], [7, 8]])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.nan, Reason.NOT_FINITE),
        (np.inf, Reason.NOT_FINITE),
        (-np.inf, Reason.NOT_FINITE),
        (1e300, Reason.NOT_FINITE),  # no float32
        (0.0, Reason.ZERO_NORM),
        (-0.0, Reason.ZERO_NORM),
        (1e-45, Reason.ZERO_NORM),  # denormal
        (1e-19, Reason.ZERO_NORM),
        (2e-18, None),
        (1e18, None),
        (1e19, None),
        (2e19, Reason.NORM_OVERFLOW),
        (-3e38, Reason.NORM_OVERFLOW),
    ],
)
@pytest.mark.parametrize("outer", [pa.list_(pa.float64(), DIM), pa.list_(pa.float64()), pa.large_list(pa.float64())])
def test_numbers_without_a_direction_are_bad(value: float, reason: Reason | None, outer: pa.DataType) -> None:
    rows = [[1.0] * DIM, [value, *[0.0] * (DIM - 1)], [2.0] * DIM]
    matrix, reasons = embedding_matrix(pa.array(rows, outer), DIM)
    assert reasons.tolist() == [None, reason, None]
    np.testing.assert_array_equal(matrix[[0, 2]], np.float32(rows)[[0, 2]] if reason is None else [rows[0], rows[2]])


def test_a_null_number_inside_a_row_is_not_finite() -> None:
    for kind in (pa.float16(), pa.float32(), pa.float64()):
        column = pa.array([[1, 2], [None, 2], [3, 4]], pa.list_(kind, 2))
        matrix, reasons = embedding_matrix(column, 2)
        assert reasons.tolist() == [None, Reason.NOT_FINITE, None]
        np.testing.assert_array_equal(matrix[[0, 2]], [[1, 2], [3, 4]])


numbers = st.one_of(st.none(), st.floats(width=32), st.sampled_from([0.0, 1e-20, 1e20, 1.0]))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.none() | st.lists(numbers, max_size=4), max_size=8),
    dim=st.integers(1, 4),
    start=st.integers(0, 8),
)
def test_reasons_agree_with_a_naive_reading(rows: list[list[float | None] | None], dim: int, start: int) -> None:
    def naive(row: list[float | None] | None) -> Reason | str | None:
        if row is None:
            return Reason.NULL_EMBEDDING
        if len(row) != dim:
            return Reason.WRONG_LENGTH
        if any(value is None or not np.isfinite(value) for value in row):
            return Reason.NOT_FINITE
        squared = sum((np.float64(value) ** 2 for value in row), np.float64(0))
        if abs(np.log10(max(squared, 1e-300)) + 36) < 1e-3 or abs(np.log10(max(squared, 1e-300)) - 38.53) < 1e-2:
            return "edge"  # float32 rounding decides
        return Reason.ZERO_NORM if squared < 1e-36 else Reason.NORM_OVERFLOW if squared > 3.4e38 else None

    matrix, reasons = embedding_matrix(pa.array(rows, pa.list_(pa.float32())).slice(start), dim)
    assert matrix.shape == (len(rows[start:]), dim)
    for row, found, values in zip(rows[start:], reasons, matrix, strict=True):
        wanted = naive(row)
        assert wanted in ("edge", found)
        if found is None:
            np.testing.assert_array_equal(values, np.float32(row))


def test_text_comes_out_plain_whatever_held_it() -> None:
    words = ["b", None, "ä", "b"]
    for column in (
        pa.array(words),
        pa.array(words, pa.large_string()),
        pa.array(words, pa.string_view()),
        pa.array(words).dictionary_encode(),
        pa.concat_arrays([pa.array(["x"]), pa.array(words)]).slice(1).dictionary_encode(),
    ):
        assert plain_column(column, pa.string()).equals(pa.array(words))
    assert plain_column(pa.array([17, None]), pa.string()).to_pylist() == ["17", None]
    assert plain_column(pa.array([17, None], pa.uint32()).dictionary_encode(), pa.int64()).equals(pa.array([17, None]))


@pytest.mark.parametrize("encode", [False, True])
def test_text_that_is_no_utf8_is_refused(encode: bool) -> None:
    column = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.int32([0, 2])), pa.py_buffer(b"\xff\xfe")])
    with pytest.raises(pa.ArrowInvalid):
        plain_column(column.dictionary_encode() if encode else column, pa.string())


def test_kept_instants_stay_the_same_instant() -> None:
    noon = datetime(2026, 3, 14, 12, 0, tzinfo=UTC)
    column = pa.array([noon], pa.timestamp("ms", tz="Asia/Tokyo"))
    kept = column.cast(kept_type("part-07", "seen", column.type))
    assert kept.to_pylist() == [noon]


@pytest.mark.parametrize(
    "kind", [pa.float16(), pa.float32(), pa.float64(), pa.dictionary(pa.int8(), pa.float32())], ids=str
)
def test_angles_outside_the_circle_are_unknown_and_counted(kind: pa.DataType) -> None:
    values = [0.0, -180.0, 180.0, 180.5, -720.0, None, float("nan"), float("inf"), -12.5]
    plain = pa.array(values, pa.float32() if pa.types.is_dictionary(kind) else kind)
    angles, bad = angle_column(plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain)
    assert angles.equals(pa.array([0.0, -180.0, 180.0, None, None, None, None, None, -12.5], pa.float32()))
    assert bad == 4


@pytest.mark.parametrize("column", [pa.nulls(3), pa.array([], pa.float32()), pa.array([5, None, -90])], ids=str)
def test_angles_without_fault_pass(column: pa.Array) -> None:
    angles, bad = angle_column(column)
    assert angles.equals(pa.array(column.to_pylist(), pa.float32()))
    assert bad == 0


def test_a_blank_subject_is_null_and_counted() -> None:
    names = pa.array(["a", "", " ", None, "\n\t", "\u3000\u00a0", " b ", "null"])
    known, blank = known_subjects(names)
    assert known.to_pylist() == ["a", None, None, None, None, None, " b ", "null"]
    assert blank == 4
    whole = pa.array(["a", None])
    assert known_subjects(whole) == (whole, 0)
