"""Rows, shards and subjects that a release adds, changes and removes, counted from the feature files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.releases import Release
from schemas.reports import Changes
from storage.location import Location
from storage.tombstones import Tombstones
from tasks.changes import changes_since
from tests.pipeline_fixtures import fixed

ROWS, D = 10, 32


def table(name: str, subjects: bool = True, seed: int = 0) -> pa.Table:
    matrix = np.random.default_rng([seed, *name.encode()]).standard_normal((ROWS, D)).astype(np.float32)
    columns = {"id": [f"{name}-{row}" for row in range(ROWS)], "embedding": fixed(matrix)}
    return pa.table({**columns, "subject": [f"{name}{row // 5}" for row in range(ROWS)]} if subjects else columns)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four shards of ten rows, each of two subjects of its own."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in "abcd":
        pq.write_table(table(name), folder / f"{name}.parquet")
    return folder


@pytest.fixture
def changed(source: Path, tmp_path: Path, run_stages, pipeline_of):
    """`changed(lost=…)` compares the source as it is now with a release of the four shards."""
    settings = pipeline_of(source, tmp_path / "store")
    first = run_stages(settings).published
    served = Release.model_construct(release="r1", models=settings.models, data=first.data)

    def compare(*, lost: bool = False, modes: tuple[str, ...] = ("per_sample", "batch_stat")) -> Changes:
        after = run_stages(settings).published.features
        return changes_since(served, None if lost else first.features, after, modes, Location(settings.store))

    return compare


def rows(changes: Changes) -> tuple[int, int, int, int]:
    return changes.rows_before, changes.rows_added, changes.rows_changed, changes.rows_removed


def test_nothing_changed(changed) -> None:
    same = changed()
    assert rows(same) == (40, 0, 0, 0)
    assert (same.shards_before, same.shards_removed, same.subjects_before, same.modes_removed) == (4, 0, None, [])


def test_a_removed_an_added_and_a_rewritten_shard(changed, source: Path) -> None:
    (source / "a.parquet").unlink()
    pq.write_table(table("e"), source / "e.parquet")
    pq.write_table(table("b", seed=1).slice(0, 8), source / "b.parquet")
    found = changed()
    assert rows(found) == (40, 10, 8, 12)
    assert (found.shards_before, found.shards_removed) == (4, 1)
    assert (found.subjects_before, found.subjects_removed) == (8, 2)


def test_same_names_and_numbers_of_rows_but_other_ids(changed, source: Path) -> None:
    for name in "abcd":
        pq.write_table(table(name.upper()), source / f"{name}.parquet")
    found = changed()
    assert rows(found) == (40, 40, 0, 40)
    assert (found.shards_removed, found.subjects_removed) == (4, 8)


def test_rows_that_move_and_shards_that_are_renamed_are_not_removed(changed, source: Path) -> None:
    tables = [pq.read_table(source / f"{name}.parquet") for name in "abc"]
    for name in "abc":
        (source / f"{name}.parquet").unlink()
    pq.write_table(pa.concat_tables(tables), source / "all.parquet")
    (source / "d.parquet").rename(source / "renamed.parquet")
    found = changed()
    assert rows(found) == (40, 0, 30, 0)
    assert (found.shards_removed, found.subjects_removed) == (0, 0)


def test_labels_that_vanish(changed, source: Path) -> None:
    for name in "ab":
        pq.write_table(table(name, subjects=False), source / f"{name}.parquet")
    found = changed()
    assert rows(found) == (40, 0, 20, 0)
    assert (found.subjects_before, found.subjects_removed) == (8, 4)


def test_forgotten_rows_are_not_removed_rows(changed, tmp_path: Path) -> None:
    """The tombstones of a `forget` that was interrupted before it erased anything."""
    tombstones = Tombstones(Location(str(tmp_path / "store")))
    tombstones.add(tombstones.tombstone("subject", name) for name in ("a0", "a1", "b0"))
    found = changed()
    assert rows(found) == (40, 0, 5, 0)
    assert (found.shards_removed, found.subjects_removed) == (0, 0)


def test_lost_features_of_the_served_release_are_counted_by_shard(changed, source: Path, tmp_path: Path) -> None:
    (source / "a.parquet").unlink()
    pq.write_table(table("b").slice(0, 6), source / "b.parquet")
    for file in (tmp_path / "store" / "features" / "mode=raw" / "shard=a").glob("*.parquet"):
        file.unlink()
    found = changed()
    assert rows(found) == (40, 0, 6, 14)
    assert (found.shards_removed, found.subjects_before) == (1, None)
    assert rows(changed(lost=True)) == (40, 0, 26, 14)


def test_a_mode_that_is_missing(changed) -> None:
    assert changed(modes=("per_sample",)).modes_removed == ["batch_stat"]
