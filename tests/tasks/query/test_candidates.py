"""Which rows are found, by every kind of index: filters of many and of few rows, and kinds that hold codes alone."""

import numpy as np
import pyarrow as pa
import pytest

from schemas.index import IndexSettings
from storage.ids import id_keys
from storage.location import Location
from storage.vectors.index import VectorIndex, build
from tasks.query import candidates
from tasks.query.candidates import Candidates
from tasks.query.rows import StoredRows
from tasks.query.search import Index

ROWS, D, SUBJECTS = 3000, 16, 150
KINDS = ["Flat", "IVF16,PQ8x4fs,RFlat", "IVF16,SQ8"]


class Stored(StoredRows):
    """Rows whose vectors and column `yaw` are in memory: what the feature files would give, and how often asked."""

    def __init__(self, matrix: np.ndarray, ids: pa.Table) -> None:
        super().__init__(Location("nowhere"), None, "raw", ids)  # nothing is read from it
        self.matrix, self.asked = matrix, 0
        self._whole["yaw"] = pa.chunked_array([pa.array(np.arange(len(matrix)) % 100)])
        self.__dict__["column_names"] = ["id", "subject", "shard", "yaw"]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        self.asked += 1
        return self.matrix[rows]


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    """Unit vectors in clusters, in the order of their keys."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((SUBJECTS, D))
    found = centres[np.arange(ROWS) % SUBJECTS] + 0.5 * random.standard_normal((ROWS, D))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module", params=KINDS)
def stored(request, matrix: np.ndarray) -> tuple[VectorIndex, Stored]:
    names = pa.array([f"row-{number}" for number in range(ROWS)])
    order = np.argsort(id_keys(names))
    subjects = pa.array([f"s{number % SUBJECTS}" if number % SUBJECTS else None for number in range(ROWS)])
    table = pa.table({
        "key": id_keys(names)[order],
        "id": names.take(pa.array(order)),
        "subject": subjects,  # of the row in the order of keys, as is the matrix
        "shard": pa.repeat(pa.scalar("only"), ROWS),
    })  # fmt: skip
    keys = table["key"].to_numpy()
    settings = IndexSettings(factory=request.param, nprobe=None if request.param == "Flat" else 16)
    return build(lambda: iter([(keys, matrix)]), ROWS, D, settings), Stored(matrix, table)


def best(scores: np.ndarray, passes: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-np.where(passes, scores, -2), axis=1, kind="stable")[:, :k]


def agreement(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([len(set(one) & set(other)) / len(other) for one, other in zip(found, expected, strict=True)]))


@pytest.mark.parametrize("few", [40, 100_000], ids=["searched", "compared"])
@pytest.mark.parametrize("condition", ["yaw < 60", "yaw = 7"])
def test_a_filter_finds_the_nearest_that_pass(stored, matrix, condition, few, monkeypatch) -> None:
    """With a limit of 40 rows the index cannot give enough of 1,800 that pass, so these are compared in the end."""
    monkeypatch.setattr(candidates, "FEW_ROWS", few)
    monkeypatch.setattr(candidates, "BLOCK_ROWS", 500)
    index, rows = stored
    chosen = rows.matching(condition)
    passes = np.isin(np.arange(ROWS), chosen)
    assert len(chosen) == {"yaw < 60": 1800, "yaw = 7": 30}[condition]
    scores, keys = Candidates(index, rows, chosen).nearest(matrix[:20], 25)
    expected = best(matrix[:20] @ matrix.T, passes, 25)
    assert passes[rows.numbers(keys)].all()
    assert agreement(rows.numbers(keys), expected) > 0.97  # codes of eight bits order almost as vectors do
    assert (np.diff(scores, axis=1) <= 0).all()


def test_own_rows_and_further_rows_of_a_subject_are_left_out(stored, matrix) -> None:
    index, rows = stored
    subjects = np.arange(ROWS) % SUBJECTS
    scores, keys = Candidates(index, rows).nearest(matrix[:5], 60, rows.keys[:5], unique_subject=True)
    numbers = rows.numbers(keys)
    named = subjects[numbers] > 0  # subject 0 is unknown: each of its rows counts by itself
    for query in range(5):
        assert query not in numbers[query]
        known = subjects[numbers[query][named[query]]]
        assert len(set(known)) == len(known)
    cosines = matrix[:5] @ matrix.T
    cosines[np.arange(5), np.arange(5)] = -2
    first = np.stack([cosines[:, subjects == one].max(axis=1) for one in range(1, SUBJECTS)], axis=1)
    found = np.where(named, scores, -2)
    np.testing.assert_allclose(-np.sort(-found, axis=1)[:, :40], -np.sort(-first, axis=1)[:, :40], atol=0.02)


def test_expansion_and_templates_read_vectors_where_the_index_has_codes_alone(stored, matrix) -> None:
    index, rows = stored
    rows.asked = 0
    search = Index("r1", "raw", index, rows, expand=3)
    found = search.search(matrix[:6], 5, columns=["yaw"])
    assert (found.expanded[:, 0] > 0.9).all()
    at = np.array([[rows.ids.to_pylist().index(name) for name in line] for line in found.ids])
    np.testing.assert_allclose(found.scores, np.vecdot(matrix[at], matrix[:6, None]), atol=1e-6)
    assert (found.columns["yaw"] == at % 100).all()
    assert search.search(matrix[:6], 5, expand=0).expanded is None
    templates = search.search(matrix[:6], 2, by="subject")
    subjects = np.arange(ROWS) % SUBJECTS
    means = np.stack([matrix[subjects == one].sum(axis=0) for one in range(1, SUBJECTS)])
    cosines = matrix[:6] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert templates.ids.tolist() == [[f"s{one + 1}" for one in line] for line in np.argsort(-cosines, axis=1)[:, :2]]
    assert (rows.asked > 0) == (index.vectors(rows.keys[:1]) is None)
