"""Tombstones: who is on the list is matched, who reads it learns no name, and a damaged list stops the run."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import StoreError
from storage.location import Location
from storage.tombstones import Tombstones


@pytest.fixture
def store(tmp_path: Path) -> Location:
    return Location(str(tmp_path))


def test_there_are_no_tombstones_at_first(store: Location) -> None:
    tombstones = Tombstones(store)
    assert not tombstones
    assert tombstones.digest == "none"
    rows, marks = tombstones.match(pa.array(["a", None]), pa.array(["p", None]))
    assert (rows.tolist(), marks) == ([False, False], [])
    assert store.files() == []


def test_who_is_on_the_list_is_matched_by_id_or_subject(store: Location) -> None:
    tombstones = Tombstones(store)
    by_id, by_subject = tombstones.mark("id", "b"), tombstones.mark("subject", "q")
    tombstones.add([tombstones.tombstone("id", "b"), tombstones.tombstone("subject", "q")])
    ids = pa.array(["a", "b", None, "c", "q", "b"])
    subjects = pa.array(["p", "p", "q", None, "b", "q"])
    for again in (tombstones, Tombstones(store)):
        rows, marks = again.match(ids, subjects)
        assert rows.tolist() == [False, True, True, False, False, True]
        assert marks == sorted([by_id, by_subject])
        rows, marks = again.match(ids, None)
        assert rows.tolist() == [False, True, False, False, False, True]
        assert marks == [by_id]
        assert again.match(ids.slice(0, 0), None)[0].shape == (0,)


def test_integer_ids_are_matched_by_their_digits(store: Location) -> None:
    tombstones = Tombstones(store)
    tombstones.add([tombstones.tombstone("id", "17")])
    assert tombstones.match(pa.array([17, None, 18]), None)[0].tolist() == [True, False, False]


@given(
    ids=st.lists(st.none() | st.sampled_from("abcd"), max_size=12),
    start=st.integers(0, 4),
    gone=st.sets(st.sampled_from(["a", "b", "x"])),
)
def test_matching_agrees_with_a_naive_reading(
    tmp_path_factory, ids: list[str | None], start: int, gone: set[str]
) -> None:
    tombstones = Tombstones(Location(str(tmp_path_factory.getbasetemp() / "nobody")))
    tombstones = tombstones.only(tombstones.tombstone("id", name) for name in gone)
    column = pa.array(ids, pa.string()).slice(start)
    rows, marks = tombstones.match(column, None)
    assert rows.tolist() == [name in gone for name in ids[start:]]
    assert marks == sorted({tombstones.mark("id", name) for name in ids[start:] if name in gone})


def test_the_list_grows_and_its_digest_follows_it(store: Location) -> None:
    tombstones = Tombstones(store)
    digests = [tombstones.digest]
    for name in ("a", "b"):
        tombstones.add([tombstones.tombstone("id", name)])
        digests.append(tombstones.digest)
    assert len(set(digests)) == 3
    again = Tombstones(store)
    assert (again.marks, again.salt, again.digest) == (tombstones.marks, tombstones.salt, digests[-1])
    again.add([again.tombstone("id", "a")])
    assert again.digest == digests[-1]


def test_the_list_contains_no_names_and_each_store_has_its_own_salt(tmp_path: Path) -> None:
    marks = []
    for name in ("one", "two"):
        tombstones = Tombstones(Location(str(tmp_path / name)))
        tombstones.add([tombstones.tombstone("subject", "Thomas Wayne")])
        marks.append(tombstones.marks)
        text = (tmp_path / name / "tombstones.json").read_text()
        assert "Thomas" not in text
        assert "Wayne" not in text
    assert marks[0] != marks[1]


def test_an_id_is_no_subject_of_the_same_name(store: Location) -> None:
    tombstones = Tombstones(store)
    assert tombstones.mark("id", "a") != tombstones.mark("subject", "a")
    tombstones.add([tombstones.tombstone("id", "a")])
    assert not np.any(tombstones.match(pa.array(["b"]), pa.array(["a"]))[0])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"salt": "00", "marks": null}',
        b'{"salt": "00", "marks": "abc"}',
        b'{"salt": "00", "marks": [1]}',
        b'{"salt": "no hex", "marks": []}',
        b'{"salt": 7, "marks": []}',
        b'{"marks": []}',
    ],
)
def test_a_damaged_list_stops_the_run(store: Location, content: bytes) -> None:
    (store / "tombstones.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"tombstones\.json: is damaged \(.*\)\. .* restore the newest copy"):
        Tombstones(store)
