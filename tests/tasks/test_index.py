"""Indexes of a release: an updated one finds what a new one finds; a damaged one is never served."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import StoreError
from schemas.index import IndexSettings
from schemas.releases import IndexRef, Release
from schemas.reports import DataQuality, GateDecision
from storage.features import features_table
from storage.ids import id_keys
from storage.location import Location
from storage.tables import Snapshot
from storage.vectors.store import open_ids, open_index
from tasks.index import Previous, index_mode

D = 32
FLAT = IndexSettings(factory="Flat")
LISTS = IndexSettings(factory="IVF4,Flat", nprobe=4)


def write(path: Path, name: str, rows: int = 50, seed: int = 0, integers: bool = False) -> np.ndarray:
    matrix = np.random.default_rng([seed, *name.encode()]).standard_normal((rows, D)).astype(np.float32)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), D)
    ids = [hash_free(name, row) if integers else f"{name}-{row}" for row in range(rows)]
    pq.write_table(pa.table({"id": ids, "embedding": embedding, "subject": [name] * rows}), path / f"{name}.parquet")
    return matrix


def hash_free(name: str, row: int) -> int:
    return ord(name) * 1_000 + row


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in "abcdefgh":
        write(folder, name)
    return folder


@pytest.fixture
def features_of(source: Path, tmp_path: Path, run_stages, pipeline_of):
    """`features_of()` publishes the source as it is now and returns the snapshot."""
    return lambda: run_stages(pipeline_of(source, tmp_path / "store")).published.features


@pytest.fixture
def store(tmp_path: Path) -> Location:
    return Location(str(tmp_path / "store"))


def release_of(name: str, features: Snapshot, reference: IndexRef, mode: str = "raw") -> Previous:
    release = Release(
        release=name,
        number=1,
        created=datetime.now(UTC),
        content="0" * 32,
        source="",
        features_version=features.version,
        quarantine_version=None,
        models={},
        indexes={mode: reference},
        data=DataQuality(shards=0, rows_read=0, rows_features=0, quarantined={}, forgotten=0, bad_shards=[]),
        gate=GateDecision(promoted=True, reason=""),
        gated={},
        gated_name="",
        report=None,
    )
    return Previous(release, features)


def found(store: Location, reference: IndexRef, queries: np.ndarray, k: int = 7) -> tuple[list[list[str]], np.ndarray]:
    """Ids of the neighbours, and scores."""
    scores, keys = open_index(store, reference).search(queries, k)
    ids = open_ids(store, reference)
    by_key = dict(zip(ids["key"].to_pylist(), ids["id"].to_pylist(), strict=True))
    return [[by_key[key] for key in row] for row in keys.tolist()], scores


def test_neighbours_are_those_of_the_cosine(source: Path, features_of, store: Location) -> None:
    reference = index_mode(store, "r1", "raw", features_of(), FLAT, None)
    names, rows = [], []
    for file in sorted(source.iterdir()):
        table = pq.read_table(file)
        names += table["id"].to_pylist()
        rows += table["embedding"].to_pylist()
    matrix = np.array(rows)
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    cosines = unit[:20] @ unit.T
    ids, scores = found(store, reference, matrix[:20].astype(np.float32))
    best = np.argsort(-cosines, axis=1)[:, :7]
    assert ids == [[names[at] for at in row] for row in best]
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, best, 1), atol=1e-5)
    assert (reference.rows, reference.dim, reference.recall_at_1, reference.recall_queries) == (400, D, 1.0, 0)


@pytest.mark.parametrize("mode", ["raw", "per_sample"])
@pytest.mark.parametrize("settings", [FLAT, LISTS], ids=["exact", "lists"])
def test_updated_index_finds_what_a_new_one_finds(
    settings: IndexSettings, mode: str, source: Path, features_of, store: Location
) -> None:
    before = features_of()
    first = index_mode(store, "r1", mode, before, settings, None)
    assert first.audit.queries == first.recall_queries == (0 if settings is FLAT else 256)
    write(source, "b", rows=40, seed=1)
    (source / "e.parquet").unlink()
    after = features_of()
    settings = settings.model_copy(update={"rebuild_share": 0.9})
    updated = index_mode(store, "r2", mode, after, settings, release_of("r1", before, first, mode))
    rebuilt = index_mode(store, "r3", mode, after, settings, None)
    assert updated.changed == 50 + 50 + 40
    assert (updated.rows, rebuilt.rows, rebuilt.changed) == (340, 340, 0)
    assert open_ids(store, updated).equals(open_ids(store, rebuilt))
    queries = np.random.default_rng(3).standard_normal((30, D)).astype(np.float32)
    ids, scores = found(store, updated, queries)
    expected_ids, expected_scores = found(store, rebuilt, queries)
    assert ids == expected_ids
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    assert not any(name.startswith("e-") for row in ids for name in row)


def test_many_changes_build_it_again(source: Path, features_of, store: Location) -> None:
    before = features_of()
    first = index_mode(store, "r1", "raw", before, LISTS, None)
    for name in "abc":
        write(source, name, seed=1)
    second = index_mode(store, "r2", "raw", features_of(), LISTS, release_of("r1", before, first))
    assert second.changed == 0


def test_nothing_changed_shares_the_files(features_of, store: Location) -> None:
    before = features_of()
    first = index_mode(store, "r1", "raw", before, FLAT, None)
    second = index_mode(store, "r2", "raw", before, FLAT, release_of("r1", before, first))
    assert second == first
    assert not (store / "indexes/r2").exists()


@pytest.mark.parametrize("former", ["IVF4,Flat", "IVF4,PQ8x4fs,RFlat"])
def test_kind_of_an_older_release_answers_and_is_replaced(
    former: str, features_of, store: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("storage.vectors.index.EXACT_ROWS", 100)
    features = features_of()
    old = index_mode(store, "r1", "raw", features, IndexSettings(factory=former), None)
    queries = np.random.default_rng(0).standard_normal((5, D))
    with caplog.at_level("INFO", "frontalis.index"):
        new = index_mode(store, "r2", "raw", features, IndexSettings(), release_of("r1", features, old))
    assert f"building a new index: it is of kind {former}, 400 rows want {new.factory}" in caplog.text
    assert new.factory.startswith("PCAR16,")
    assert all((found(store, reference, queries)[1][:, 0] > 0.2).all() for reference in (old, new))


def test_finished_index_is_taken_as_it_is(features_of, store: Location) -> None:
    features = features_of()
    first = index_mode(store, "r1", "raw", features, FLAT, None)
    stamps = {file: file.stat().st_mtime_ns for file in Path(store.path, "indexes").rglob("*") if file.is_file()}
    assert len(stamps) == 2
    assert index_mode(store, "r1", "raw", features, FLAT, None) == first
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps


@pytest.mark.parametrize("which", ["ids.parquet", "index.faiss"])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_half_finished_index_is_made_again(which: str, damage: str, features_of, store: Location) -> None:
    features = features_of()
    first = index_mode(store, "r1", "raw", features, FLAT, None)
    file = Path(store.path, "indexes/r1/raw", which)
    hurt(file, damage)
    with pytest.raises(StoreError, match="index.faiss" if which == "index.faiss" else "ids.parquet"):
        open_index(store, first) if which == "index.faiss" else open_ids(store, first)
    assert index_mode(store, "r1", "raw", features, FLAT, None) == first
    assert len(open_index(store, first)) == open_ids(store, first).num_rows == 400


def hurt(file: Path, damage: str) -> None:
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-10])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def test_index_left_over_from_other_rows_is_made_again(source: Path, features_of, store: Location) -> None:
    index_mode(store, "r1", "raw", features_of(), FLAT, None)
    (source / "a.parquet").unlink()
    assert index_mode(store, "r1", "raw", features_of(), FLAT, None).rows == 350


def test_damaged_previous_index_is_not_carried_on(source: Path, features_of, store: Location) -> None:
    before = features_of()
    first = index_mode(store, "r1", "raw", before, FLAT, None)
    hurt(Path(store.path, first.path), "flipped")
    shared = index_mode(store, "r2", "raw", before, FLAT, release_of("r1", before, first))
    assert len(open_index(store, shared)) == 400
    write(source, "b", seed=1)
    updated = index_mode(store, "r3", "raw", features_of(), FLAT, release_of("r1", before, first))
    assert (len(open_index(store, updated)), updated.changed) == (400, 0)


def test_previous_index_of_other_rows_is_not_carried_on(source: Path, features_of, store: Location) -> None:
    before = features_of()
    whole = index_mode(store, "r1", "raw", before, LISTS, None)
    index = open_index(store, whole)
    index.update(open_ids(store, whole)["key"].to_numpy()[:1])
    with (store / whole.path).writing() as file:
        written = index.write(file)
    lacking = whole.model_copy(update={"digest": written.digest, "size": written.size})
    write(source, "b", seed=1)
    updated = index_mode(store, "r2", "raw", features_of(), LISTS.model_copy(update={"rebuild_share": 0.9}),
                         release_of("r1", before, lacking))  # fmt: skip
    assert (len(open_index(store, updated)), updated.changed) == (400, 0)


def test_damaged_feature_file_is_named(features_of, store: Location) -> None:
    features = features_of()
    [path] = [path for path in features.files if path.startswith("mode=raw/shard=c/")]
    hurt(Path(features_table(store).place.path, path), "cut")
    with pytest.raises(StoreError, match=r"shard=c/.* run `frontalis reprocess` to compute it again"):
        index_mode(store, "r1", "raw", features, FLAT, None)


def test_renamed_shard_keeps_its_rows(source: Path, features_of, store: Location) -> None:
    before = features_of()
    first = index_mode(store, "r1", "raw", before, FLAT, None)
    (source / "b.parquet").rename(source / "z.parquet")
    second = index_mode(store, "r2", "raw", features_of(), IndexSettings(factory="Flat", rebuild_share=0.9),
                        release_of("r1", before, first))  # fmt: skip
    ids = open_ids(store, second)
    assert second.rows == 400
    assert set(ids["shard"].to_pylist()) == set("acdefghz")


def test_integer_ids_stay_integers(tmp_path: Path, run_stages, pipeline_of, store: Location) -> None:
    source = tmp_path / "integers"
    source.mkdir()
    write(source, "a", integers=True)
    features = run_stages(pipeline_of(source, store.uri)).published.features
    ids = open_ids(store, index_mode(store, "r1", "raw", features, FLAT, None))
    assert ids["id"].type == pa.int64()
    assert sorted(ids["id"].to_pylist()) == [hash_free("a", row) for row in range(50)]
    np.testing.assert_array_equal(ids["key"].to_numpy(), id_keys(ids["id"]))


def test_shards_of_one_row_have_a_recall(tmp_path: Path, run_stages, pipeline_of, store: Location) -> None:
    source = tmp_path / "lonely"
    source.mkdir()
    for name in "abc":
        write(source, name, rows=1)
    features = run_stages(pipeline_of(source, store.uri)).published.features
    reference = index_mode(store, "r1", "raw", features, IndexSettings(factory="HNSW8"), None)
    assert reference.recall_at_1 == 1.0
    assert IndexRef.model_validate_json(reference.model_dump_json()) == reference
