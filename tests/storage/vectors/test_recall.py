"""Recall: equal to NumPy's count of shared neighbours, wherever the rows that are compared come from."""

import faiss
import numpy as np
import pytest

from schemas.index import IndexSettings
from storage.vectors.index import build
from storage.vectors.recall import audit_recall


def make_rows(count, dim):
    """Ten rows around each of count/10 centres, at scattered keys, lengths other than 1."""
    numbers = np.random.default_rng(0)
    centres = np.repeat(numbers.standard_normal((-(-count // 10), dim)), 10, axis=0)[:count]
    vectors = (3 * centres + numbers.standard_normal((count, dim))).astype(np.float32)
    return numbers.choice(2**62, count, replace=False), vectors


def stream(keys, vectors, size=300):
    return lambda: ((keys[at : at + size], vectors[at : at + size]) for at in range(0, len(keys), size))


def built(keys, vectors, factory, **choices):
    settings = IndexSettings(factory=factory, training_rows=1000, **choices)
    return build(stream(keys, vectors), len(keys), vectors.shape[1], settings)


def unread():
    raise AssertionError("the rows are in the index")


def test_an_exact_index_has_all_neighbours():
    keys, vectors = make_rows(500, 16)
    recall = audit_recall(built(keys, vectors, "Flat"), stream(keys, vectors), vectors[:40] + 0.3)
    assert (recall.at_1, recall.at_10, recall.queries) == (1, 1, 40)


@pytest.mark.parametrize("factory", ["IVF32,Flat", "IVF32,SQ4", "HNSW4", "PCA8,IVF32,Flat"])
def test_recall_equals_that_of_numpy(factory):
    keys, vectors = make_rows(2000, 16)
    index = built(keys, vectors, factory, nprobe=2, ef_search=10)
    queries = np.random.default_rng(9).standard_normal((50, 16)).astype(np.float32)
    recall = audit_recall(index, stream(keys, vectors), queries)
    lengths = np.linalg.norm(vectors, axis=1)
    wanted = keys[np.argsort(-(queries @ vectors.T) / lengths, axis=1)[:, :10]]
    _, given = index.search(queries, 10)
    shared = [len(set(w) & set(g)) / 10 for w, g in zip(wanted.tolist(), given.tolist(), strict=True)]
    assert recall.at_1 == pytest.approx((wanted[:, 0] == given[:, 0]).mean())
    assert recall.at_10 == pytest.approx(np.mean(shared))
    assert 0 < recall.at_10 < 1


def test_an_index_of_uncompressed_vectors_is_measured_without_reading_them():
    keys, vectors = make_rows(9000, 8)
    lists = built(keys, vectors, "IVF16,Flat", nprobe=1)
    queries = np.random.default_rng(9).standard_normal((50, 8)).astype(np.float32)
    found = audit_recall(lists, unread, queries)
    exact = built(keys, vectors, "Flat").search(queries, 10)[1]
    answers = lists.search(queries, 10)[1]
    shared = [len(set(w) & set(g)) / 10 for w, g in zip(exact.tolist(), answers.tolist(), strict=True)]
    assert found.at_10 == pytest.approx(np.mean(shared))
    assert found.at_1 == pytest.approx((exact[:, 0] == answers[:, 0]).mean())
    assert found.at_10 < 1
    with pytest.raises(AssertionError, match="in the index"):
        audit_recall(built(keys, vectors, "IVF16,SQ8"), unread, queries)


@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF64,PQ16x4fs,RFlat", "PCAR24,IVF64,PQ6x4fs,RFlat"])
def test_the_wanted_recall_chooses_the_lists_that_are_visited(factory):
    keys, vectors = make_rows(4000, 32)
    queries = vectors[np.random.default_rng(4).choice(4000, 384, replace=False)] + 0.5
    found = {}
    for wanted in (0.5, 0.98):
        index = built(keys, vectors, factory)
        recall = audit_recall(index, stream(keys, vectors), queries, wanted)
        found[wanted] = faiss.try_extract_index_ivf(index._index).nprobe
        assert recall.queries == 256
        assert recall.at_10 > wanted - 0.03
    assert found[0.5] < found[0.98] <= 32


def test_a_recall_that_no_number_of_lists_reaches_takes_no_more_than_help():
    keys, vectors = make_rows(4000, 32)
    index = built(keys, vectors, "IVF64,PQ4x4")
    recall = audit_recall(index, stream(keys, vectors), vectors[::10] + 0.5, 1.0)
    all_lists = built(keys, vectors, "IVF64,PQ4x4", nprobe=64)
    best = audit_recall(all_lists, stream(keys, vectors), vectors[::10] + 0.5).at_10
    assert 0.95 * best < recall.at_10 < 0.9


def test_fewer_than_ten_rows_none_and_no_queries():
    keys, vectors = make_rows(4, 8)
    assert audit_recall(built(keys, vectors, "Flat"), stream(keys, vectors), vectors).at_10 == 1
    assert np.isnan(audit_recall(built(keys, vectors, "Flat"), stream(keys, vectors), vectors[:0]).at_1)
    nothing = build(lambda: iter(()), 0, 8, IndexSettings())
    assert np.isnan(audit_recall(nothing, lambda: iter(()), vectors).at_10)
