"""How every kind of bad input is handled: a quarantined row, a bad shard, a refusal, or nothing at all.

`docs/bad-input.md` is the same table in words.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from schemas.errors import BadModelError, BadShardError, FrontalisError, SettingsError, StoreError
from storage.features import features_table, quarantine_table, read_table
from storage.location import Location

D = 32
N = 12


@dataclass(frozen=True)
class Row:
    """Rows go to quarantine, each with its reason; the others become features."""

    reasons: Mapping[str, int]


@dataclass(frozen=True)
class Bad:
    """The shard is bad: it is named with the reason, and the other shards are used."""

    says: str


@dataclass(frozen=True)
class Fine:
    """All rows become features; `warns` is part of a warning."""

    rows: int = N
    warns: str = ""


@dataclass(frozen=True)
class Case:
    """A second shard beside a good one: a table, or whatever `write` puts under the path."""

    outcome: Row | Bad | Fine
    table: pa.Table | None = None
    write: Callable[[Path], None] | None = None
    name: str = "odd.parquet"
    options: Mapping[str, object] = field(default_factory=dict)


def vectors(n: int = N, dim: int = D, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def shard(ids: list[object] | pa.Array | None = None, embedding: pa.Array | None = None, **columns: object) -> pa.Table:
    ids = [f"odd-{row}" for row in range(N)] if ids is None else ids
    embedding = fixed(vectors(len(ids))) if embedding is None else embedding
    return pa.table({"id": ids, "embedding": embedding, **columns})


def fixed(matrix: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def with_row(row: object, at: int = 3) -> pa.Array:
    """A column of lists with one row replaced."""
    rows: list[object] = vectors().tolist()
    rows[at] = row
    return pa.array(rows, pa.list_(pa.float32()))


def with_value(value: float) -> pa.Array:
    matrix = vectors()
    matrix[3, 5] = value
    return fixed(matrix)


def first_bad(bad: int, rows: int = N) -> pa.Array:
    """Vectors of which the first ones are not finite."""
    matrix = vectors(rows)
    matrix[:bad] = np.nan
    return fixed(matrix)


def scaled(factor: float) -> pa.Array:
    matrix = vectors()
    matrix[3] *= np.float32(factor)
    return fixed(matrix)


def dense(value: object, rows: int = 100) -> pa.Array:
    """The same value in every row, stored once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))


def dense_shard(**columns: pa.Array) -> pa.Table:
    return pa.table({"id": [f"odd-{row}" for row in range(100)], "embedding": fixed(vectors(100)), **columns})


def long_lists(path: Path) -> None:
    lists = pa.ListArray.from_arrays(range(0, 11_000_000, 1_000_000), np.zeros(10_000_000, np.float32))
    pq.write_table(dense_shard(embedding=pa.chunked_array([lists] * 10)), path, row_group_size=10)


def with_id(value: str) -> pa.Table:
    return shard([value, *(f"odd-{row}" for row in range(1, N))])


def raw_bytes(content: bytes) -> Callable[[Path], None]:
    return lambda path: void(path.write_bytes(content))


def void(_: object) -> None:
    """Drop what a call returns."""


def truncated(path: Path) -> None:
    pq.write_table(shard(), path)
    path.write_bytes(path.read_bytes()[:-200])


def flipped(path: Path) -> None:
    """Damage the vectors but neither the ids nor the footer; the page checksum finds it."""
    pq.write_table(shard(), path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    at = content.find(vectors().tobytes()[:64])
    content[at + 9] ^= 0x40
    path.write_bytes(content)


class _Kms(pe.KmsClient):
    def wrap_key(self, key_bytes: bytes, _: str) -> bytes:
        return key_bytes

    def unwrap_key(self, wrapped_key: bytes, _: str) -> bytes:
        return wrapped_key


def encrypted(plaintext_footer: bool) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        config = pe.EncryptionConfiguration(
            footer_key="k", column_keys={"k": ["embedding.list.element"]}, plaintext_footer=plaintext_footer
        )
        properties = pe.CryptoFactory(lambda _: _Kms()).file_encryption_properties(pe.KmsConnectionConfig(), config)
        with pq.ParquetWriter(path, shard().schema, encryption_properties=properties) as writer:
            writer.write_table(shard())

    return write


def coded(**options: object) -> Callable[[Path], None]:
    return lambda path: pq.write_table(shard(), path, **options)


def yaws(values: list[float | None]) -> pa.Table:
    return shard([f"odd-{row}" for row in range(len(values))], yaw=pa.array(values, pa.float32()))


INVALID_UTF8 = pa.array([b"\xff\xfe", *(f"odd-{row}".encode() for row in range(1, N))]).view(pa.string())
NO_UTF8 = os.fsdecode(b"odd-\xff.parquet")

CASES: dict[str, Case] = {
    # rows
    "null vector": Case(Row({"null_embedding": 1}), shard(embedding=with_row(None))),
    "short vector": Case(Row({"wrong_length": 1}), shard(embedding=with_row([1.0] * (D - 1)))),
    "long vector": Case(Row({"wrong_length": 1}), shard(embedding=with_row([1.0] * (D + 1)))),
    "empty vector": Case(Row({"wrong_length": 1}), shard(embedding=with_row([]))),
    "null within a vector": Case(Row({"not_finite": 1}), shard(embedding=with_row([None] + [1.0] * (D - 1)))),
    "NaN": Case(Row({"not_finite": 1}), shard(embedding=with_value(np.nan))),
    "infinity": Case(Row({"not_finite": 1}), shard(embedding=with_value(np.inf))),
    "minus infinity": Case(Row({"not_finite": 1}), shard(embedding=with_value(-np.inf))),
    "zero vector": Case(Row({"zero_norm": 1}), shard(embedding=scaled(0.0))),
    "denormal vector": Case(Row({"zero_norm": 1}), shard(embedding=scaled(1e-40))),
    "overflowing vector": Case(Row({"norm_overflow": 1}), shard(embedding=scaled(1e30))),
    "null id": Case(Row({"null_id": 1}), shard([None, *(f"odd-{row}" for row in range(1, N))])),
    "id twice in the shard": Case(Row({"duplicate_id": 1}), shard(["odd-1", *(f"odd-{row}" for row in range(1, N))])),
    "id of an earlier shard": Case(Row({"duplicate_id": 1}), with_id("good-0")),
    "several at once": Case(
        Row({"null_id": 1, "duplicate_id": 1, "not_finite": 1}),
        shard([None, "odd-2", *(f"odd-{row}" for row in range(2, N))], with_value(np.nan)),
    ),
    "most rows bad": Case(Bad("10 of 12 rows are bad (10 not_finite)"), shard(embedding=first_bad(10))),
    "half of the rows bad": Case(Row({"not_finite": 10}), shard([f"odd-{r}" for r in range(20)], first_bad(10, 20))),
    "one bad row of one": Case(Row({"not_finite": 1}), shard(["odd-0"], first_bad(1, 1))),
    "nine bad rows of nine": Case(Row({"not_finite": 9}), shard([f"odd-{r}" for r in range(9)], first_bad(9, 9))),
    "only ids of an earlier shard": Case(Row({"duplicate_id": N}), shard([f"good-{row}" for row in range(N)])),
    "one vector of a million numbers": Case(Row({"wrong_length": 1}), shard(embedding=with_row([0.5] * 1_000_000))),
    # what a small file unpacks to
    "one id of a megabyte": Case(Fine(), with_id("x" * 1_000_000)),
    "ids of a megabyte": Case(
        Bad("one value to 1,000,000; at most 16,384 a row"), dense_shard(id=dense("x" * 1_000_000))
    ),
    "subjects of a megabyte": Case(
        Bad("one value to 1,000,000; at most 16,384 a row"), dense_shard(subject=dense("x" * 1_000_000))
    ),
    "vectors of a million numbers": Case(Bad("one value to 4,000,000; at most 32,768 a row"), write=long_lists),
    # ids that are merely odd
    "id with a newline": Case(Fine(), with_id("a\nb")),
    "id with a slash": Case(Fine(), with_id("/etc/passwd")),
    "id with dots": Case(Fine(), with_id("../../etc/passwd")),
    "id of 10,000 characters": Case(Fine(), with_id("x" * 10_000)),
    "id of emoji": Case(Fine(), with_id("👩‍🚀🏳️‍🌈")),
    "id of HTML": Case(Fine(), with_id("<script>alert(1)</script>")),
    "id with control characters": Case(Fine(), with_id("\x1b[2J\0\x07")),
    "empty id": Case(Fine(), with_id("")),
    "id that is no UTF-8": Case(Bad("that are no UTF-8"), shard(INVALID_UTF8)),
    # names of shards
    "name with a newline": Case(Fine(), shard(), name="a\nb.parquet"),
    "name of dots": Case(Fine(), shard(), name="odd/a....parquet"),
    "hidden name": Case(Fine(rows=0), shard(), name="..parquet"),
    "name with percent signs": Case(Fine(), shard(), name="%2e%2e%2fodd.parquet"),
    "name like a partition": Case(Fine(), shard(), name="mode=raw.parquet"),
    "name of emoji": Case(Fine(), shard(), name="👩‍🚀.parquet"),
    "name of HTML": Case(Fine(), shard(), name="<img src=x onerror=alert(1)>.parquet"),
    "name of 240 characters": Case(Fine(), shard(), name="n" * 240 + ".parquet"),
    "name in a folder": Case(Fine(), shard(), name="deep/er/odd.parquet"),
    "name that is no UTF-8": Case(Bad("UTF-8"), shard(), name=NO_UTF8),
    # columns
    "no id column": Case(Bad("column 'id' is missing"), shard().drop_columns("id")),
    "no embedding column": Case(Bad("column 'embedding' is missing"), shard().drop_columns("embedding")),
    "misnamed embedding": Case(
        Bad("'embedding' is missing; found id, vector. Name it under"), shard().rename_columns(["id", "vector"])
    ),
    "embedding column twice": Case(
        Bad("'embedding' appears 2 times"),
        shard(again=fixed(vectors())).rename_columns(["id", "embedding", "embedding"]),
    ),
    "vectors of integers": Case(Bad("wanted fixed_size_list"), shard(embedding=pa.array([[1] * D] * N))),
    "vectors as text": Case(Bad("has type string"), shard(embedding=pa.array(["1,2,3"] * N))),
    "ids of floats": Case(Bad("'id' has type double"), shard(pa.array(np.arange(N) + 0.5))),
    "ids of unsigned 64 bit": Case(Bad("'id' has type uint64"), shard(pa.array(range(N), pa.uint64()))),
    "ids of integers beside text": Case(Bad("the ids are int64, the store holds string"), shard(list(range(N - 1)))),
    "yaw as text": Case(Bad("'yaw' has type string"), shard(yaw=["left"] * N)),
    "subject as float": Case(Bad("'subject' has type double"), shard(subject=[0.5] * N)),
    # dimensions
    "another dimension": Case(Bad("has 16 numbers a row, the models want 32"), shard(embedding=fixed(vectors(dim=16)))),
    "another dimension, as lists": Case(
        Bad("no row of 32 numbers"), shard(embedding=pa.array(vectors(dim=16).tolist(), pa.list_(pa.float32())))
    ),
    "bytes of another dimension": Case(
        Bad("has 16 numbers"), shard(embedding=pa.array([bytes(range(64))] * N, pa.binary(64)))
    ),
    "bytes that are no floats": Case(Bad("D×4 bytes"), shard(embedding=pa.array([b"abc"] * N, pa.binary(3)))),
    # files
    "no row": Case(Fine(rows=0), shard().slice(0, 0)),
    "no column": Case(Bad("no column at all"), pa.table({})),
    "empty file": Case(Bad("cannot be read as Parquet"), write=raw_bytes(b"")),
    "not Parquet": Case(Bad("cannot be read as Parquet"), write=raw_bytes(b"id,embedding\n1,2\n" * 50)),
    "magic number alone": Case(Bad("cannot be read as Parquet"), write=raw_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")),
    "truncated": Case(Bad("cannot be read as Parquet"), write=truncated),
    "flipped bit": Case(Bad("cannot be read as Parquet"), write=flipped),
    "encrypted": Case(Bad("cannot be read as Parquet"), write=encrypted(plaintext_footer=False)),
    "encrypted column": Case(Bad("cannot be read as Parquet"), write=encrypted(plaintext_footer=True)),
    "broken link": Case(Bad("cannot be found"), write=lambda path: path.symlink_to(path.parent / "nowhere")),
    "named pipe": Case(Fine(rows=0), write=lambda path: os.mkfifo(path)),
    "folder of that name": Case(Fine(rows=0), write=lambda path: path.mkdir()),
    "dictionary": Case(Fine(), write=coded(use_dictionary=True)),
    "zstd": Case(Fine(), write=coded(compression="zstd")),
    "lz4": Case(Fine(), write=coded(compression="lz4")),
    "snappy": Case(Fine(), write=coded(compression="snappy")),
    "gzip, pages of version 2": Case(Fine(), write=coded(compression="gzip", data_page_version="2.0")),
    "one row a row group": Case(Fine(), write=coded(row_group_size=1)),
    # angles and labels
    "yaw null": Case(Fine(), yaws([None] * N)),
    "yaw beyond a turn": Case(Fine(warns="1 angles outside ±180°"), yaws([400.0] + [20.0] * (N - 1))),
    "yaw NaN": Case(Fine(warns="1 angles outside ±180° or not finite"), yaws([float("nan")] + [20.0] * (N - 1))),
    "yaw in radians": Case(Fine(rows=60, warns="look like radians"), yaws(list(np.linspace(-1.5, 1.5, 60)))),
    "one sample a subject": Case(Fine(), shard(subject=[f"s{row}" for row in range(N)])),
    "one subject only": Case(Fine(), shard(subject=["s"] * N)),
    "subject null": Case(Fine(), shard(subject=pa.nulls(N))),
    "subject blank": Case(
        Fine(warns="3 blank subjects are unknown"), shard(subject=["", " ", "\t\u3000", *"abcabcabc"])
    ),
    "kept column missing": Case(Bad("column 'note' is missing"), shard(), options={"columns": {"keep": ["note"]}}),
    "kept column of structs": Case(
        Bad("cannot be kept"), shard(note=[{"a": 1}] * N), options={"columns": {"keep": ["note"]}}
    ),
    "kept column of another type": Case(
        Bad("does not fit the string"), shard(note=[b"\xff"] * N), options={"columns": {"keep": ["note"]}}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_outcome(name: str, tmp_path: Path, run_stages, pipeline_of) -> None:
    case = CASES[name]
    source, store = tmp_path / "source", tmp_path / "store"
    source.mkdir()
    good = shard([f"good-{row}" for row in range(N)], fixed(vectors(seed=2)), note=["n"] * N)
    pq.write_table(good, source / "good.parquet")
    odd = source / case.name
    odd.parent.mkdir(parents=True, exist_ok=True)
    if case.write is not None:
        case.write(odd)
    else:
        with odd.open("wb") as file:
            pq.write_table(case.table, file)

    plan, results, published = run_stages(pipeline_of(source, store, **case.options))

    data = published.data
    warnings = [warning for result in results for warning in result.warnings]
    held = read_table(quarantine_table(Location(str(store))), published.quarantine.files.values(), ["shard", "reason"])
    assert data.rows_read == data.rows_features + sum(data.quarantined.values())
    assert Counter(held["reason"].to_pylist()) == data.quarantined
    if isinstance(case.outcome, Bad):
        [fault] = data.bad_shards
        assert case.outcome.says in fault.reason
        assert fault.shard in fault.reason
        assert not fault.kept
        assert data.rows_read == N
        assert not warnings
    elif isinstance(case.outcome, Row):
        assert not data.bad_shards
        assert data.quarantined == case.outcome.reasons
        assert data.rows_read == N + case.table.num_rows
        assert len(set(held["shard"].to_pylist())) == 1
    else:
        assert not data.bad_shards
        assert not data.quarantined
        assert data.rows_read == N + case.outcome.rows
        assert [case.outcome.warns in warning for warning in warnings] == [True] * bool(case.outcome.warns)
    _check_table(store, published, plan)
    _check_nothing_outside(tmp_path)


def test_odd_ids_come_back_as_they_were(tmp_path: Path, run_stages, pipeline_of) -> None:
    odd = [case.table["id"][0].as_py() for name, case in CASES.items() if name.startswith("id ") and case.table and
           isinstance(case.outcome, Fine)]  # fmt: skip
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(shard(odd), source / "odd.parquet")
    run_stages(pipeline_of(source, tmp_path / "store"))
    stored = pl.scan_delta(str(tmp_path / "store" / "features")).filter(mode="raw").collect()
    assert len(odd) >= 7
    assert sorted(stored["id"].to_list()) == sorted(odd)


REFUSALS: dict[str, tuple[Callable[[Path, Mapping[str, str]], dict[str, object]], type[FrontalisError], str]] = {
    "no source": (lambda at, m: {"source": str(at / "nowhere")}, SettingsError, "nowhere: does not exist; pass"),
    "source without shards": (lambda at, m: {"source": str(at / "empty")}, SettingsError, "holds no .parquet file"),
    "only empty shards": (lambda at, m: {"source": str(at / "rowless")}, SettingsError, "hold no row"),
    "only bad rows": (lambda at, m: {"source": str(at / "zeros")}, BadShardError, "no row can be used"),
    "only bad shards": (lambda at, m: {"source": str(at / "bad")}, BadShardError, "cannot be read as Parquet"),
    "two shards of one name": (lambda at, m: {"source": str(at / "twins")}, SettingsError, "share the name 'a'"),
    "bad row and fail": (
        lambda at, m: {"source": str(at / "mixed"), "reweight": {"on_bad_rows": "fail"}},
        BadShardError,
        "shard a, row 3 (id 'odd-3'): not_finite; fix it, or set on_bad_rows = \"quarantine\"",
    ),
    "missing model": (lambda at, m: {"models": {"per_sample": str(at / "no")}}, SettingsError, "there is no such file"),
    "model of another mode": (
        lambda at, m: {"models": {"batch_stat": m["per_sample"]}},
        BadModelError,
        "was trained for per_sample; pass it as per_sample=",
    ),
    "truncated model": (lambda at, m: {"models": {"per_sample": str(at / "cut")}}, BadModelError, "model per_sample="),
    "pickle as model": (lambda at, m: {"models": {"per_sample": str(at / "pickle")}}, BadModelError, "safetensors"),
    "named pipe as model": (lambda at, m: {"models": {"per_sample": str(at / "pipe")}}, StoreError, "is a named pipe"),
    "hostile header": (lambda at, m: {"models": {"per_sample": str(at / "huge")}}, BadModelError, "cut short"),
    "model of another dimension": (
        lambda at, m: {"models": {"per_sample": str(at / "other")}},
        BadShardError,
        "has 32 numbers a row, the models want 16",
    ),
    "models of two dimensions": (
        lambda at, m: {"models": {"per_sample": str(at / "other"), "batch_stat": m["batch_stat"]}},
        BadModelError,
        "different length ({'per_sample': 16, 'batch_stat': 32})",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str, tmp_path: Path, run_stages, pipeline_of, tiny_models, make_checkpoint) -> None:
    for folder in ("empty", "rowless", "zeros", "bad", "twins", "mixed", "fine"):
        (tmp_path / folder).mkdir()
    pq.write_table(shard(), tmp_path / "fine" / "a.parquet")
    pq.write_table(shard().slice(0, 0), tmp_path / "rowless" / "a.parquet")
    pq.write_table(shard(embedding=fixed(np.zeros((N, D), np.float32))), tmp_path / "zeros" / "a.parquet")
    pq.write_table(shard(embedding=with_value(np.nan)), tmp_path / "mixed" / "a.parquet")
    (tmp_path / "bad" / "a.parquet").write_bytes(b"nothing")
    pq.write_table(shard(), tmp_path / "twins" / "a.parquet")
    pq.write_table(shard(), tmp_path / "twins" / "a.pq")
    good = tiny_models.per_sample.read_bytes()
    (tmp_path / "cut").write_bytes(good[: len(good) // 2])
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pickle").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR." + b"\0" * 64)
    (tmp_path / "huge").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    make_checkpoint(tmp_path / "other", "per_sample", dim=16)
    change, error, says = REFUSALS[name]
    changed = change(tmp_path, tiny_models.by_mode)
    settings = pipeline_of(changed.pop("source", tmp_path / "fine"), tmp_path / "store", **changed)

    with pytest.raises(error) as caught:
        run_stages(settings)

    assert says in str(caught.value)
    assert features_table(Location(str(tmp_path / "store"))).snapshot().version == -1


def test_the_document_says_the_same() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "bad-input.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")][1:]
    said = {name: (outcome, says) for name, outcome, says in rows}
    assert list(said) == [*CASES, *REFUSALS]
    for name, case in CASES.items():
        outcome, says = said[name]
        if isinstance(case.outcome, Row):
            assert (outcome, set(says.split(", "))) == ("quarantined row", {f"`{one}`" for one in case.outcome.reasons})
        elif isinstance(case.outcome, Bad):
            assert (outcome, says) == ("bad shard", f"… {case.outcome.says} …")
        elif case.outcome.rows == 0 and name != "no row":
            assert outcome == "passed over"
        else:
            assert outcome == "accepted"
            assert case.outcome.warns in says
    for name, (_, error, says) in REFUSALS.items():
        assert said[name] == (f"refused (`{error.__name__}`)", f"… {says} …")


def _check_table(store: Path, published: object, plan: object) -> None:
    """Other readers see what was counted, finite, and the same rows in every mode."""
    table = pl.scan_delta(str(store / "features")).collect()
    by_mode = {mode[0]: rows for mode, rows in table.partition_by("mode", as_dict=True).items()}
    assert set(by_mode) == {"raw", "per_sample", "batch_stat"}
    assert {rows.height for rows in by_mode.values()} == {published.data.rows_features}
    for rows in by_mode.values():
        assert np.isfinite(np.concatenate(rows["front"].to_list())).all()
        assert rows["id"].n_unique() == rows.height
    assert set(table["shard"].to_list()) <= set(plan.inputs)


def _check_nothing_outside(folder: Path) -> None:
    assert {entry.name for entry in folder.iterdir()} == {"source", "store"}
    assert {entry.name for entry in (folder / "store").iterdir()} <= {"features", "quarantine", "models", "manifest"}
    for mode in (folder / "store" / "features").glob("mode=*"):
        assert all(shard.name.startswith("shard=") and shard.is_dir() for shard in mode.iterdir())
