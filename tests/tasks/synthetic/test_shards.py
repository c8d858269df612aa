"""Synthetic shards keep the input contract, and what is planted in them is exactly what is found wrong."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import SettingsError
from schemas.settings import ColumnNames
from schemas.shards import check_shard
from storage.columns import embedding_matrix
from tasks.synthetic.shards import synthesize


def shards_of(folder):
    return {path.name: pq.read_table(path) for path in sorted(folder.iterdir())}


def faults_of(folder, dim):
    """Count what is wrong, reading shards and rows in order; an id is wrong from its second time on."""
    seen, faults = set(), Counter()
    for table in shards_of(folder).values():
        here = set()
        _, reasons = embedding_matrix(table["embedding"].combine_chunks(), dim)
        for row_id, reason in zip(table["id"].to_pylist(), reasons, strict=True):
            if row_id is None:
                faults["null id"] += 1
            elif row_id in seen or row_id in here:
                faults["repeated from before" if row_id in seen else "repeated here"] += 1
            elif reason is not None:
                faults[str(reason)] += 1
            if row_id is not None:
                here.add(row_id)
        seen |= here
    return faults


def test_shards_keep_the_contract(tmp_path):
    made = synthesize(tmp_path, subjects=10, per_subject=14, dim=32, shards=3)
    tables = shards_of(tmp_path)
    assert [path.rsplit("/", 1)[-1] for path in made.files] == list(tables)
    assert list(tables) == ["part-000.parquet", "part-001.parquet", "part-002.parquet"]
    for name, table in tables.items():
        assert check_shard(name, table.schema, ColumnNames()).dim == 32
        assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
        assert all(column.null_count == 0 for column in table.columns)
    everything = pa.concat_tables(tables.values())
    assert (made.rows, made.bad_rows) == (len(everything), 0) == (140, 0)
    assert len(set(everything["id"].to_pylist())) == 140
    assert Counter(everything["pose"].to_pylist()) == {"frontal": 100, "profile": 40}
    assert set(Counter(everything["subject"].to_pylist()).values()) == {14}
    subjects = [set(table["subject"].to_pylist()) for table in tables.values()]
    assert sum(map(len, subjects)) == 10
    assert not faults_of(tmp_path, 32)


def test_files_are_uncompressed_in_groups_of_8192_rows(tmp_path):
    synthesize(tmp_path, subjects=900, per_subject=20, dim=4, shards=1)
    file = pq.ParquetFile(tmp_path / "part-000.parquet")
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [8192, 8192, 18_000 - 2 * 8192]
    assert {groups[0].column(i).compression for i in range(6)} == {"UNCOMPRESSED"}
    assert file.read()["id"].to_pylist() == [f"{s:06d}-{n:03d}" for s in range(900) for n in range(20)]


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(tmp_path):
    arguments = {"subjects": 6, "dim": 16, "shards": 2, "bad_rows": 7}
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        synthesize(tmp_path / name, seed=seed, **arguments)
    contents = {name: [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "abc"}
    assert contents["a"] == contents["b"]
    assert contents["a"][0] != contents["c"][0]


@pytest.mark.parametrize("changed", [{"shards": 5}, {"bad_rows": 9}, {"subjects": 57}], ids=str)
def test_an_embedding_depends_on_seed_and_subject_alone(tmp_path, changed):
    def embeddings(folder):
        tables = shards_of(folder).values()
        return {
            row_id: vector
            for table in tables
            for row_id, vector in zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True)
            if row_id and "bad" not in row_id and vector
        }

    arguments = {"subjects": 50, "dim": 64, "shards": 2}  # some blocks are cut by the edge of a shard
    synthesize(tmp_path / "plain", **arguments)
    synthesize(tmp_path / "changed", **arguments | changed)
    plain, other = embeddings(tmp_path / "plain"), embeddings(tmp_path / "changed")
    if "bad_rows" in changed:  # repeated ids hide a good row here
        same = [row_id for row_id in plain if plain[row_id] == other[row_id]]
        assert len(same) >= len(plain) - 9
    else:
        assert plain == {row_id: other[row_id] for row_id in plain}


@pytest.mark.parametrize(("bad_rows", "shards"), [(1, 3), (6, 3), (20, 3), (120, 4), (12, 1)])
def test_planted_rows_are_found_wrong_and_no_others(tmp_path, bad_rows, shards):
    made = synthesize(tmp_path, subjects=12, per_subject=3, dim=8, shards=shards, bad_rows=bad_rows)
    faults = faults_of(tmp_path, 8)
    assert (made.rows, made.bad_rows) == (36 + bad_rows, bad_rows)
    assert sum(len(table) for table in shards_of(tmp_path).values()) == made.rows
    assert faults.total() == bad_rows
    each = [bad_rows // 6 + (kind < bad_rows % 6) for kind in range(6)]
    if shards == 1:
        each = [*each[:4], each[4] + each[5], 0]
    kinds = ["not_finite", "zero_norm", "null_embedding", "null id", "repeated here", "repeated from before"]
    assert [faults[kind] for kind in kinds] == each


@pytest.mark.parametrize(("per_subject", "profiles"), [(1, 0), (2, 1), (7, 2), (14, 4), (28, 8)])
def test_two_sevenths_are_profiles(tmp_path, per_subject, profiles):
    synthesize(tmp_path, subjects=1, per_subject=per_subject, dim=4, shards=1)
    table = pq.read_table(tmp_path / "part-000.parquet")
    assert table["pose"].to_pylist().count("profile") == profiles
    turned = np.abs(table["yaw"].to_numpy()) > 20
    assert turned.tolist() == [pose == "profile" for pose in table["pose"].to_pylist()]


@pytest.mark.parametrize(
    "wrong",
    [
        {"subjects": 2},
        {"per_subject": 0},
        {"dim": 1},
        {"shards": 0},
        {"bad_rows": -1},
        {"seed": -1},
        {"population_seed": -1},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused_by_name(tmp_path, wrong):
    arguments = {"subjects": 5, "per_subject": 2, "dim": 4, "shards": 3} | wrong
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        synthesize(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["part-000.parquet", "other.parquet", "below/notes.txt", ".hidden"])
def test_a_folder_that_is_not_empty_is_refused_and_left_as_it_is(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"real")
    with pytest.raises(SettingsError, match=rf"is not empty: it holds {name}\..* choose an empty folder"):
        synthesize(tmp_path, subjects=6, per_subject=1, dim=4, shards=3)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_bytes() == b"real"
