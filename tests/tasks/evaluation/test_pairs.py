"""Accuracy over a pairs file, on rows written by hand: thresholds of other folds, failures to acquire, bad files."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from schemas.errors import SettingsError
from tasks.evaluation.pairs import pairs_accuracy, read_pairs
from tasks.evaluation.rows import LabelledRows

# Four people on a circle, two rows each: the angle between rows is what a score is made of.
ANGLES = {"a0": 0, "a1": 10, "b0": 90, "b1": 110, "c0": 180, "c1": 220, "d0": 270, "d1": 290}


def rows(names: tuple[str, ...] = tuple(ANGLES)) -> LabelledRows:
    angles = np.radians([ANGLES[name] for name in names])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    codes = np.array(["abcd".index(name[0]) for name in names])
    return LabelledRows(
        list(names), list("abcd"), codes, np.zeros(len(names), np.int64), np.arange(len(names)), {"raw": features}
    )


def accuracy(tmp_path, pairs: list[tuple[str, int, str, str, bool]], of: LabelledRows | None = None, stored=None):
    path = tmp_path / "pairs.parquet"
    frame = pl.DataFrame(pairs, schema=["protocol", "fold", "id_a", "id_b", "same"], orient="row")
    frame.write_parquet(path)
    of = of or rows()
    return pairs_accuracy(
        of, of.features["raw"], read_pairs(str(path)), frozenset(ANGLES) if stored is None else stored
    )


GENUINE = [
    ("P", 0, "a0", "a1", True),
    ("P", 0, "b0", "b1", True),
    ("P", 1, "c0", "c1", True),
    ("P", 1, "d0", "d1", True),
]
IMPOSTOR = [("P", 0, "a0", "b0", False), ("P", 1, "c0", "d0", False)]


def test_threshold_comes_from_the_other_folds(tmp_path) -> None:
    # Fold 0 alone separates its pairs at 20 degrees, the wider pair of fold 1 (40 degrees) falls outside of that.
    (found,) = accuracy(tmp_path, GENUINE + IMPOSTOR)
    assert (found.protocol, found.n_pairs, found.n_folds, found.missing, found.left_out) == ("P", 6, 2, 0, 0)
    assert found.accuracy_mean == pytest.approx((3 / 3 + 2 / 3) / 2)
    assert found.accuracy_sd == pytest.approx(np.std([1, 2 / 3], ddof=1))


def test_protocols_are_apart(tmp_path) -> None:
    both = GENUINE + IMPOSTOR + [("Q", *pair[1:]) for pair in GENUINE + IMPOSTOR]
    first, second = accuracy(tmp_path, both)
    assert (first.protocol, second.protocol) == ("P", "Q")
    assert first.accuracy_mean == second.accuracy_mean


def test_unknown_ids_are_failures_to_acquire_and_others_are_left_out(tmp_path) -> None:
    pairs = [*GENUINE, *IMPOSTOR, ("P", 0, "nobody", "a0", False), ("P", 1, "d1", "nobody", False)]
    few = rows(("a0", "a1", "b0", "b1", "c0", "c1"))
    (found,) = accuracy(tmp_path, pairs, few)
    assert (found.n_pairs, found.missing, found.left_out) == (4, 2, 2)


def test_single_fold_is_not_estimable(tmp_path) -> None:
    (found,) = accuracy(tmp_path, [("P", 0, *pair[2:]) for pair in GENUINE + IMPOSTOR])
    assert found.accuracy_mean is None
    assert "two or more" in found.reason
    assert found.eer is not None


def test_a_row_is_never_paired_with_itself_or_its_copy(tmp_path) -> None:
    doubled = rows()
    doubled.duplicates[5] = doubled.duplicates[4]  # c1 has the bytes of c0
    self_pairs = [("P", 0, "a0", "a0", True), ("P", 1, "nobody", "nobody", True)]
    (found,) = accuracy(tmp_path, GENUINE + IMPOSTOR + self_pairs, doubled)
    assert (found.n_pairs, found.copies, found.missing, found.left_out) == (5, 3, 0, 0)


def test_repeated_pairs_are_counted_in_either_order(tmp_path) -> None:
    again = [("P", 1, "a1", "a0", True), ("P", 0, "a0", "a1", True)]
    (found,) = accuracy(tmp_path, GENUINE + IMPOSTOR + again)
    assert (found.n_pairs, found.repeated, found.contradicting) == (8, 2, 0)


def test_disputed_labels_are_counted(tmp_path) -> None:
    disputed = [("P", 1, "a1", "a0", False), ("P", 0, "c0", "b1", True)]  # called both; not what the subjects say
    (found,) = accuracy(tmp_path, GENUINE + IMPOSTOR + disputed)
    assert (found.n_pairs, found.repeated, found.contradicting) == (8, 0, 3)


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (GENUINE, "no impostor pair outside of fold 0"),
        (IMPOSTOR, "no genuine pair outside of fold 0"),
        ([*GENUINE, IMPOSTOR[1]], "no impostor pair outside of fold 1"),
    ],
)
def test_a_threshold_is_not_chosen_on_one_kind_of_pair(tmp_path, pairs, reason) -> None:
    (found,) = accuracy(tmp_path, pairs)
    assert (found.accuracy_mean, found.accuracy_sd) == (None, None)
    assert found.reason == f"not estimable: there is {reason} to choose its threshold with"


def test_protocol_and_fold_are_optional(tmp_path) -> None:
    path = tmp_path / "pairs.parquet"
    pl.DataFrame({"id_a": ["a0"], "id_b": ["a1"], "same": [True]}).write_parquet(path)
    (found,) = pairs_accuracy(rows(), rows().features["raw"], read_pairs(str(path)), frozenset(ANGLES))
    assert (found.protocol, found.n_pairs) == ("pairs", 1)


def written(tmp_path, first: list[object], second: list[object]):
    path = tmp_path / "pairs.parquet"
    pl.DataFrame({"id_a": first, "id_b": second, "same": [True] * len(first)}).write_parquet(path)
    return read_pairs(str(path))


def test_ids_are_those_of_the_store_however_they_are_written(tmp_path) -> None:
    stored = pa.chunked_array([["caf\u00e9", " x", "x"], ["y ", "z"]])
    pairs = written(tmp_path, ["cafe\u0301", "x", "y"], [" caf\u00e9\n", " x", "nobody"]).as_stored(stored)
    assert pairs.table["id_a"].to_pylist() == ["caf\u00e9", "x", "y "]
    assert pairs.table["id_b"].to_pylist() == ["caf\u00e9", " x", "nobody"]
    with pytest.raises(SettingsError, match=r"pairs.parquet: id ' x ': 2 stored ids differ from it only in blanks"):
        written(tmp_path, [" x "], ["z"]).as_stored(stored)
    with pytest.raises(SettingsError, match=r"pairs.parquet: id ' ': is empty"):
        written(tmp_path, ["z"], [" "]).as_stored(stored)


def test_integer_ids_are_their_digits(tmp_path) -> None:
    stored = pa.chunked_array([[7, 8, -1]])
    for numbers in ([7, 9], ["7", "9"]):
        pairs = written(tmp_path, numbers, [8, -1] if numbers[0] == 7 else ["8", "-1"]).as_stored(stored)
        assert pairs.table["id_a"].to_pylist() == ["7", "9"]
    for typed in ("007", "+7", " 7", "7.0", "x"):
        with pytest.raises(SettingsError, match="the ids of this store are integers of 64 bits") as refused:
            written(tmp_path, ["8"], [typed]).as_stored(stored)
        assert f"id {typed!r}" in str(refused.value)


def test_digest_is_of_the_content(tmp_path) -> None:
    accuracy(tmp_path, GENUINE)
    first = read_pairs(f"file://{tmp_path}/pairs.parquet").digest
    accuracy(tmp_path, IMPOSTOR)
    assert read_pairs(str(tmp_path / "pairs.parquet")).digest != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"no parquet", "cannot be read as Parquet"),
        (pl.DataFrame({"id_a": ["x"], "id_b": ["y"]}), "column 'same' is missing"),
        (pl.DataFrame({"id_a": ["x"], "id_b": ["y"], "same": ["perhaps"]}), "boolean 'same'"),
        (
            pl.DataFrame({"id_a": ["x"], "id_b": ["y"], "same": [None]}, schema_overrides={"same": pl.Boolean}),
            "1 nulls",
        ),
    ],
)
def test_unusable_files_are_refused(tmp_path, content, message) -> None:
    path = tmp_path / "pairs.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        content.write_parquet(path)
    with pytest.raises(SettingsError, match=message):
        read_pairs(str(path))
