"""Names that are keys: equal names mean equal bytes, and no name from the data leaves its folder."""

import os
import re
from pathlib import PurePosixPath

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import StoreError
from schemas.features import (
    PARTITIONS,
    FeatureKey,
    digest_of,
    feature_schema,
    file_schema,
    input_digest,
    printable,
    shard_key,
)

hostile = st.sampled_from(
    ["..", "../..", "/etc/passwd", "a/b", "a\\b", "", ".", "x\n", "x\0", "é", "😀", "<b>", "a=b", "%"]
)
# What os.listdir may give: any text, bytes that are no UTF-8 as lone surrogates.
file_names = hostile | st.binary(max_size=130).map(os.fsdecode) | st.text("abcXYZ019._-~", max_size=110)


@given(name=file_names)
def test_a_key_is_one_plain_step_of_a_path(name: str) -> None:
    key = shard_key(name)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,99}", key)
    assert PurePosixPath("features", f"shard={key}").parts == ("features", f"shard={key}")


@given(names=st.sets(file_names, min_size=2, max_size=40))
def test_different_names_have_different_keys(names: set[str]) -> None:
    assert len({shard_key(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["part-0001", "a", "2026.03.14_x", "x" * 100])
def test_a_plain_name_is_its_own_key(name: str) -> None:
    assert shard_key(name) == name


@pytest.mark.parametrize(
    ("name", "starts"), [("x" * 101, f"{'x' * 60}~"), ("a b/c", "a_b_c~"), ("..", "shard~"), (".hidden", "hidden~")]
)
def test_another_name_stays_recognisable(name: str, starts: str) -> None:
    assert shard_key(name).startswith(starts)


def test_keys_never_change_between_versions() -> None:
    # A changed key would compute every such shard again. Computed by hand: BLAKE2b-128 of 8 bytes of length, then text.
    assert shard_key("day 1/part-0") == "day_1_part-0~79c696fbdd"
    assert digest_of(b"a", b"bc") == "f14abc19c330e936bb9c8506d69bac9b"
    assert input_digest("c0ffee", [3, 1], ["b", "a"]) == "1f8faeea978b23121325d252a54c8568"


@given(st.lists(st.binary(max_size=6), max_size=4), st.lists(st.binary(max_size=6), max_size=4))
def test_digests_keep_their_parts_apart(left: list[bytes], right: list[bytes]) -> None:
    assert (digest_of(*left) == digest_of(*right)) == (left == right)


def test_the_input_digest_follows_all_that_a_shard_contributes_and_no_order() -> None:
    digests = {
        input_digest("content"),
        input_digest("content", [1]),
        input_digest("content", [1, 2]),
        input_digest("content", [12]),
        input_digest("content", [], ["1"]),
        input_digest("content", [1], ["1"]),
        input_digest("other"),
    }
    assert len(digests) == 7
    assert input_digest("c", [2, 1], ["b", "a"]) == input_digest("c", iter([1, 2]), {"a", "b"})


def test_a_quarantine_file_has_the_name_of_its_raw_rows() -> None:
    raw = FeatureKey("raw", "part-0", "aa", "bb")
    assert raw.path == "mode=raw/shard=part-0/aa-bb.parquet"
    assert raw.quarantine_path == "shard=part-0/aa-bb.parquet"
    assert FeatureKey.parse(raw.path) == FeatureKey.parse(raw.quarantine_path) == raw


SHARDS = st.text(min_size=1, max_size=120).map(shard_key)
HEX = st.binary(min_size=1, max_size=16).map(bytes.hex)


@given(st.builds(FeatureKey, st.sampled_from(["raw", "per_sample", "batch_stat"]), SHARDS, HEX, HEX))
def test_a_key_is_read_back_from_its_path(key: FeatureKey) -> None:
    assert FeatureKey.parse(key.path) == key


@pytest.mark.parametrize(
    "path",
    [
        "",
        "mode=raw/shard=a/mine.parquet",
        "mode=raw/shard=a/aa-bb.parquet.bak",
        "mode=raw/shard=a/b/aa-bb.parquet",
        "part-00000-0a1b-c000.snappy.parquet",
        "mode=raw/aa-bb.parquet",
        "features/mode=raw/shard=a/aa-bb.parquet",
    ],
)
def test_other_names_are_refused(path: str) -> None:
    with pytest.raises(StoreError, match=f"^{path}: is not the name of a feature file"):
        FeatureKey.parse(path)


def test_bytes_that_are_no_utf8_can_be_printed() -> None:
    assert printable("straße/part") == "straße/part"
    shown = printable(os.fsdecode(b"part-\xff"))
    assert shown == r"part-\udcff"
    shown.encode()


def test_a_file_holds_all_columns_but_those_in_its_path() -> None:
    table = feature_schema(pa.int64(), [pa.field("camera", pa.string())])
    assert table.field("id").type == pa.int64()
    assert file_schema(table).names == [name for name in table.names if name not in PARTITIONS]
    assert file_schema(table).names[-4:] == ["camera", "front", "identity", "pose_branch"]
