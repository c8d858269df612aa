"""Feature files: vectors are not copied, bytes depend on rows alone, damage is not a failure to read."""

import io
import pickle
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import StoreError
from schemas.features import VECTOR, feature_schema, file_schema
from storage.features import (
    DamagedFilesError,
    check_files,
    complete_rows,
    features_table,
    matrix_of,
    parquet_writer,
    read_rows,
    read_table,
    take_rows,
    vector_column,
)
from storage.location import Location
from storage.tables import FileTable, LiveFile

SCHEMA = file_schema(feature_schema(pa.string()))
MATRIX = np.random.default_rng(1).standard_normal((10, 3)).astype(np.float32)


def rows_of(matrix: np.ndarray, first: int = 0) -> pa.Table:
    columns: dict[str, object] = {name: pa.nulls(len(matrix), SCHEMA.field(name).type) for name in SCHEMA.names}
    ids = [f"id-{first + row}" for row in range(len(matrix))]
    return pa.table({**columns, "id": ids, "front": vector_column(matrix)}, schema=SCHEMA)


def write(table: FileTable, path: str, matrix: np.ndarray = MATRIX, group: int = 4) -> LiveFile:
    place = table.place / path
    with place.writing() as file, parquet_writer(file, SCHEMA) as writer:
        writer.write_table(rows_of(matrix), row_group_size=group)
    mode, shard, _ = path.split("/")
    return LiveFile(path, place.size(), len(matrix), {"mode": mode.split("=")[1], "shard": shard.split("=")[1]})


@pytest.fixture
def table(tmp_path: Path) -> FileTable:
    return features_table(Location(str(tmp_path)))


@pytest.fixture
def file(table: FileTable) -> LiveFile:
    return write(table, "mode=raw/shard=a/x.parquet")


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (10, 3), (257, 192)])
def test_a_matrix_comes_back_from_its_column(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    column = vector_column(matrix)
    assert column.type == VECTOR
    assert column.to_pylist() == matrix.tolist()
    back = matrix_of(column, "x")
    np.testing.assert_array_equal(back.reshape(shape), matrix)
    assert back.dtype == np.float32


def test_neither_way_copies() -> None:
    column = vector_column(MATRIX)
    assert np.shares_memory(column.values.to_numpy(), MATRIX)
    assert np.shares_memory(matrix_of(column, "x"), MATRIX)
    assert np.shares_memory(matrix_of(pa.chunked_array([column]), "x"), MATRIX)


def test_slices_chunks_and_strided_matrices_keep_their_rows() -> None:
    column = vector_column(MATRIX)
    np.testing.assert_array_equal(matrix_of(column.slice(3, 4), "x"), MATRIX[3:7])
    chunks = pa.chunked_array([column.slice(8), column.slice(5, 0), column.slice(0, 2)])
    np.testing.assert_array_equal(matrix_of(chunks, "x"), MATRIX[[8, 9, 0, 1]])
    np.testing.assert_array_equal(matrix_of(vector_column(MATRIX[::-2]), "x"), MATRIX[::-2])
    assert matrix_of(pa.chunked_array([], VECTOR), "x").shape == (0, 0)


@pytest.mark.parametrize("rows", [[[1.0, 2.0], [3.0]], [[1.0, 2.0], None], [None, [1.0, 2.0]], [[1.0], [2.0, 3.0]]])
def test_vectors_that_differ_in_length_are_refused(rows: list[list[float] | None]) -> None:
    for column in (pa.array(rows, VECTOR), pa.chunked_array([pa.array([row], VECTOR) for row in rows])):
        with pytest.raises(StoreError, match=r"file-7: the vectors differ in length or are missing"):
            matrix_of(column, "file-7")


def test_equal_rows_make_equal_bytes_and_other_rows_others(table: FileTable) -> None:
    for name in ("a", "b"):
        write(table, f"mode=raw/shard={name}/x.parquet")
    write(table, "mode=raw/shard=c/x.parquet", MATRIX + np.float32(1e-7))
    a, b, c = (Path((table.place / f"mode=raw/shard={name}/x.parquet").path).read_bytes() for name in "abc")
    assert a == b != c


def test_vectors_are_stored_plain_with_checksums(table: FileTable, file: LiveFile) -> None:
    place = Path((table.place / file.path).path)
    metadata = pq.ParquetFile(place).metadata
    column = {metadata.row_group(0).column(at).path_in_schema: at for at in range(metadata.num_columns)}
    front = metadata.row_group(0).column(column["front.list.element"])
    assert (front.compression, front.has_dictionary_page, front.statistics) == ("UNCOMPRESSED", False, None)
    assert MATRIX[:4].tobytes() in place.read_bytes()
    assert pl.read_parquet(place)["front"].dtype == pl.List(pl.Float32)


def test_rows_are_read_in_batches_of_the_columns_asked_for(table: FileTable, file: LiveFile) -> None:
    batches = list(read_rows(table, file, ["front", "id"], rows=4))
    assert [batch.num_rows for batch in batches] == [4, 4, 2]
    assert batches[0].schema.names == ["front", "id"]
    np.testing.assert_array_equal(np.concatenate([matrix_of(batch["front"], "x") for batch in batches]), MATRIX)


def test_partition_columns_are_added_where_asked_for(table: FileTable, file: LiveFile) -> None:
    other = write(table, "mode=per_sample/shard=b/x.parquet", MATRIX[:2])
    found = read_table(table, [file, other], ["shard", "id", "mode"])
    assert found.schema.names == ["shard", "id", "mode"]
    assert found["shard"].to_pylist() == ["a"] * 10 + ["b"] * 2
    assert found["mode"].to_pylist() == ["raw"] * 10 + ["per_sample"] * 2
    assert found["id"].to_pylist() == [f"id-{row}" for row in [*range(10), 0, 1]]
    none = read_table(table, [], ["id", "front"])
    assert (none.num_rows, none.schema.field("front").type) == (0, VECTOR)


def test_complete_files_are_not_truncated_or_damaged(table: FileTable, file: LiveFile) -> None:
    place = table.place / file.path
    assert complete_rows(place) == 10
    content = place.read_bytes()
    for spoiled in (b"", content[:-1], content[: len(content) // 2], flipped(content)):
        Path(place.path).write_bytes(spoiled)
        assert complete_rows(place) is None
    place.delete()
    assert complete_rows(place) is None


def flipped(content: bytes) -> bytes:
    """One bit of one number changed: only a checksum can detect it."""
    at = content.index(MATRIX[8].tobytes())
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("spoil", [flipped, lambda content: content[:-20], lambda content: b""])
def test_a_damaged_file_is_reported_and_stays(table: FileTable, file: LiveFile, spoil) -> None:
    place = table.place / file.path
    Path(place.path).write_bytes(spoil(place.read_bytes()))
    damaged = Path(place.path).read_bytes()
    with pytest.raises(DamagedFilesError, match=r"x\.parquet: is damaged \(.+\); run `frontalis reprocess`") as raised:
        list(read_rows(table, file, ["front"]))
    assert [one.uri for one in raised.value.places] == [place.uri]
    assert Path(place.path).read_bytes() == damaged
    place.delete()
    with pytest.raises(StoreError, match=r"x\.parquet: is missing; run `frontalis reprocess`"):
        list(read_rows(table, file, ["front"]))


def test_a_whole_file_of_another_number_of_rows_is_damage_too(table: FileTable, file: LiveFile) -> None:
    write(table, file.path, MATRIX[:9])
    with pytest.raises(StoreError, match="9 rows instead of 10"):
        list(read_rows(table, file, ["front"]))
    with pytest.raises(DamagedFilesError, match="9 rows instead of 10"):
        check_files(table, [file])


class FlakyDisk:
    """A file system whose every file fails after `good` bytes, `times` times; then all is well."""

    def __init__(self, fs: object, good: int, times: int) -> None:
        self.fs, self.good, self.times = fs, good, times

    def __getattr__(self, name: str) -> object:
        return getattr(self.fs, name)

    def open_input_file(self, path: str) -> pa.PythonFile:
        content = Path(path).read_bytes()
        fails, self.times = self.times > 0, self.times - 1
        return pa.PythonFile(FlakyFile(content, self.good if fails else len(content)), mode="r")


class FlakyFile(io.BytesIO):
    def __init__(self, content: bytes, good: int) -> None:
        super().__init__(content)
        self.good = good

    def read(self, size: int | None = -1) -> bytes:
        start = self.tell()
        piece = super().read(size)
        if start < self.good < start + len(piece) or start == self.good:
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation: Connection reset by peer")
        return piece


@pytest.mark.parametrize("times", [1, 100])
def test_storage_that_fails_to_answer_costs_no_file(table: FileTable, file: LiveFile, times: int) -> None:
    before = Path((table.place / file.path).path).read_bytes()
    table.place.fs = FlakyDisk(table.place.fs, good=300, times=times)
    with pytest.raises(StoreError, match=r"x\.parquet: cannot be read now \(.*Connection reset by peer.*\); run again"):
        list(read_rows(table, file, ["front"]))
    assert Path((table.place / file.path).path).read_bytes() == before


@pytest.mark.parametrize("at", [[0], [9], [3, 4], [0, 1, 5, 9], range(10)])
def test_single_rows_are_those_of_the_whole_file(table: FileTable, file: LiveFile, at) -> None:
    rows = np.array(at)
    whole = read_table(table, [file], ["id", "front"])
    assert take_rows(table, file, ["id", "front"], rows).equals(whole.take(rows).combine_chunks())


def test_row_groups_without_a_wanted_row_are_not_read(table: FileTable, file: LiveFile) -> None:
    damaged = bytearray((table.place / file.path).read_bytes())
    damaged[damaged.index(MATRIX[9].tobytes())] ^= 1  # in the last of three row groups
    (table.place / file.path).write_bytes(bytes(damaged))
    assert (
        matrix_of(take_rows(table, file, ["front"], np.array([2, 7]))["front"], "x").tolist() == MATRIX[[2, 7]].tolist()
    )
    with pytest.raises(DamagedFilesError, match="is damaged"):
        take_rows(table, file, ["front"], np.array([2, 8]))


def test_any_flipped_bit_is_refused_or_changes_nothing(table: FileTable) -> None:
    """Footer and headers between the pages have no checksums of their own; the digests cover every byte."""
    file = write(
        table, "mode=raw/shard=a/y.parquet", np.random.default_rng(2).standard_normal((9, 2)).astype(np.float32)
    )
    place = table.place / file.path
    content = place.read_bytes()
    good = read_table(table, [file], ["id", "subject", "front"])
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    chance = np.random.default_rng(3)
    places = [*chance.integers(0, footer, 400), *chance.integers(footer, len(content), 400)]
    for at, bit in zip(places, chance.integers(0, 8, 800), strict=True):
        Path(place.path).write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        with pytest.raises(DamagedFilesError):
            check_files(table, [file])
        assert complete_rows(place) is None
        if at < footer:
            continue
        with pytest.raises(DamagedFilesError):
            read_table(table, [file], ["id", "subject", "front"])
    Path(place.path).write_bytes(content)
    assert read_table(table, [file], ["id", "subject", "front"]) == good


def test_other_readers_skip_the_digests(table: FileTable, file: LiveFile) -> None:
    place = (table.place / file.path).path
    assert pq.read_table(place)["id"].to_pylist() == pl.read_parquet(place)["id"].to_list()


def test_the_error_of_damaged_files_survives_pickling(table: FileTable) -> None:
    error = pickle.loads(pickle.dumps(DamagedFilesError([table.place / "a", table.place / "b"], "its digest differs")))
    assert [place.uri for place in error.places] == [(table.place / name).uri for name in "ab"]
    assert "a and 1 more: is damaged (its digest differs)" in str(error)
