"""Queries: the right neighbours, by id or by vector; what cannot be answered is refused in one sentence."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.checkpoint import load
from models.inference import Reweighter
from schemas.errors import SettingsError, StoreError
from tasks.query import answer
from tasks.query.search import MAX_K

D = 32
ROWS = 40


def vectors(name: str) -> np.ndarray:
    return np.random.default_rng([*name.encode()]).standard_normal((ROWS, D)).astype(np.float32)


def write(path: Path, name: str, ids: list[object]) -> None:
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors(name).reshape(-1)), D)
    table = {"id": ids, "embedding": embedding, "subject": [f"{name}{row // 4}" for row in range(ROWS)]}
    pq.write_table(pa.table(table), path / f"{name}.parquet")


@pytest.fixture(scope="module")
def serve(tmp_path_factory, serve_stages, pipeline_of) -> Callable[..., str]:
    """`serve(ids of shard a, ids of shard b)` gives a store with one release that is served."""

    def make(*ids: list[object]) -> str:
        folder = tmp_path_factory.mktemp("serve")
        (folder / "source").mkdir()
        for name, some in zip("ab", ids, strict=True):
            write(folder / "source", name, some)
        settings = pipeline_of(folder / "source", folder / "store")
        serve_stages(settings)
        return settings.store

    return make


@pytest.fixture(scope="module")
def store(serve) -> str:
    return serve([f"a-{row}" for row in range(ROWS)], [f"b-{row}" for row in range(ROWS)])


@pytest.fixture(scope="module")
def integer_store(serve) -> str:
    return serve(list(range(ROWS)), [-row - 1 for row in range(ROWS - 1)] + [2**63 - 1])


def unit(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix.astype(np.float64), axis=1, keepdims=True)


def features(mode: str, models) -> np.ndarray:
    matrix = np.concatenate([vectors("a"), vectors("b")])
    return matrix if mode == "raw" else Reweighter(load(models.by_mode[mode])).query(matrix)


@pytest.mark.parametrize("mode", ["raw", "per_sample", "batch_stat"])
def test_neighbours_of_a_stored_id(mode: str, store: str, tiny_models) -> None:
    names = [f"{name}-{row}" for name in "ab" for row in range(ROWS)]
    every = unit(features(mode, tiny_models))
    cosines = every @ every.T
    found = answer(store, mode, ids=["a-3", "b-39"], k=5)
    assert (found.release, found.mode, found.k) == ("r1", mode, 5)
    for at, result in zip((3, ROWS + 39), found.results, strict=True):
        order = [row for row in np.argsort(-cosines[at]) if row != at][:5]
        assert result.query == names[at]
        assert [neighbour.id for neighbour in result.neighbours] == [names[row] for row in order]
        assert [neighbour.rank for neighbour in result.neighbours] == [1, 2, 3, 4, 5]
        assert [neighbour.subject for neighbour in result.neighbours] == [
            f"{names[row][0]}{int(names[row][2:]) // 4}" for row in order
        ]
        assert [neighbour.shard for neighbour in result.neighbours] == [names[row][0] for row in order]
        np.testing.assert_allclose([one.score for one in result.neighbours], cosines[at, order], atol=1e-5)


def test_row_finds_itself_when_asked_to(store: str) -> None:
    [result] = answer(store, "raw", ids=["a-0"], k=1, include_self=True).results
    assert (result.subject, result.neighbours[0].id) == ("a0", "a-0")
    assert result.neighbours[0].score == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("mode", ["raw", "per_sample", "batch_stat"])
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_new_vectors_go_through_the_model(mode: str, suffix: str, store: str, tiny_models, tmp_path: Path) -> None:
    path = tmp_path / f"queries{suffix}"
    queries = vectors("queries")[:6]
    if suffix == ".npy":
        np.save(path, queries)
    else:
        pq.write_table(pa.table({"embedding": queries.astype(np.float64).tolist(), "id": [*"uvwxy", None]}), path)
    every = unit(features(mode, tiny_models))
    through = queries if mode == "raw" else Reweighter(load(tiny_models.by_mode[mode])).query(queries)
    cosines = unit(through) @ every.T
    found = answer(store, mode, vectors=str(path), k=3)
    assert [result.query for result in found.results] == ([*"uvwxy", 5] if suffix == ".parquet" else list(range(6)))
    for row, result in enumerate(found.results):
        np.testing.assert_allclose(
            [neighbour.score for neighbour in result.neighbours], np.sort(cosines[row])[::-1][:3], atol=1e-5
        )


def test_stored_vector_finds_its_row(store: str, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", vectors("b")[7].astype(np.float64))
    [result] = answer(store, "per_sample", vectors=str(tmp_path / "one.npy"), k=1).results
    assert result.neighbours[0].id == "b-7"


def test_more_neighbours_than_rows(store: str) -> None:
    [result] = answer(store, "raw", ids=["a-0"], k=MAX_K).results
    assert len(result.neighbours) == 2 * ROWS - 1
    assert "a-0" not in [neighbour.id for neighbour in result.neighbours]
    scores = [neighbour.score for neighbour in result.neighbours]
    assert scores == sorted(scores, reverse=True)


def test_integer_ids(integer_store: str) -> None:
    found = answer(integer_store, "raw", ids=["7", "-3", str(2**63 - 1)], k=1, include_self=True)
    assert [result.neighbours[0].id for result in found.results] == [7, -3, 2**63 - 1]
    assert [result.query for result in found.results] == [7, -3, 2**63 - 1]
    for wrong in ("a", "1.5", "", "99999999999999999999", "7\x00", "007", "+5", " 6", "6 ", "-0", "1_0", "\u0663"):
        with pytest.raises(SettingsError, match="ids of this store are integers"):
            answer(integer_store, "raw", ids=[wrong])


def test_text_ids_are_compared_without_blanks_and_composition(serve) -> None:
    names = [f"a-{row}" for row in range(ROWS)]
    names[:4] = ["Zo\u00eb", "twin", "twin ", " padded"]
    store = serve(names, [f"b-{row}" for row in range(ROWS)])
    for typed, stored in (("Zoe\u0308 ", "Zo\u00eb"), ("padded", " padded"), ("twin", "twin"), ("twin ", "twin ")):
        assert answer(store, "raw", ids=[typed]).results[0].query == stored
    with pytest.raises(SettingsError, match=r"--id ' twin': 2 ids of release r1 differ from it only in blanks"):
        answer(store, "raw", ids=[" twin"])


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "k of zero": ({"ids": ["a-0"], "k": 0}, "-k 0: must be 1 to 10000"),
    "k too large": ({"ids": ["a-0"], "k": 10_001}, "-k 10001: must be 1 to 10000"),
    "nothing asked": ({}, "pass either --id or --vectors"),
    "both asked": ({"ids": ["a-0"], "vectors": "x.npy"}, "pass either --id or --vectors"),
    "unknown id": ({"ids": ["nobody"]}, "--id 'nobody': is not in release r1"),
    "endless id": ({"ids": ["x" * 10_000]}, r"x… \(10,000 characters\): is not in"),
    "id with control characters": ({"ids": ["\x1b[2J\n"]}, r"--id '\\x1b\[2J\\n'"),
    "id that is no UTF-8": ({"ids": ["\udcff"]}, r"--id '\\udcff': is no UTF-8"),
    "unknown release": ({"ids": ["a-0"], "release": "r9"}, "release 'r9' is not in .*; the latest are: r1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_questions(name: str, store: str) -> None:
    options, says = REFUSED[name]
    with pytest.raises(SettingsError, match=says):
        answer(store, "raw", **options)


def test_refused_mode_and_store(store: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="mode other: release r1 has raw, per_sample, batch_stat"):
        answer(store, "other", ids=["a-0"])
    with pytest.raises(SettingsError, match="none: does not exist; check the path"):
        answer(str(tmp_path / "none"), "raw", ids=["a-0"])


@pytest.mark.parametrize("which", ["index.faiss", "ids.parquet"])
def test_damaged_index_answers_nothing(which: str, serve) -> None:
    store = serve([f"a-{row}" for row in range(ROWS)], [f"b-{row}" for row in range(ROWS)])
    file = Path(store, "indexes/r1/raw", which)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 3] ^= 4
    file.write_bytes(damaged)
    with pytest.raises(StoreError, match=which):
        answer(store, "raw", ids=["a-0"])
    assert answer(store, "per_sample", ids=["a-0"]).results
