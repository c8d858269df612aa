"""Exact search against NumPy, and the promise that an answer depends on the vectors alone."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import SettingsError, StoreError
from storage.vectors import exact
from storage.vectors.exact import exact_search, merge_best, nearest, rescore, unit_rows

NUMBERS = np.random.default_rng(5)


def flat_over(rows):
    flat = faiss.IndexFlatIP(rows.shape[1])
    flat.add(rows)
    return flat


def brute_force(rows, keys, queries, k):
    """Order all rows by float64 inner product rounded to float32, then by key, with Python's own sort."""
    scores = np.array([[np.float32(np.dot(q.astype(float), r.astype(float))) for r in rows] for q in queries])
    best = [sorted(range(len(rows)), key=lambda i, s=s: (-s[i], keys[i]))[:k] for s in scores]
    return np.take_along_axis(scores, np.array(best), 1), keys[np.array(best)]


@pytest.mark.parametrize("dim", [1, 3, 192, 512])
def test_unit_rows_have_length_one_at_any_scale(dim):
    vectors = NUMBERS.standard_normal((50, dim)) * np.logspace(-30, 30, 50)[:, None]
    unit = unit_rows(vectors.astype(np.float32), dim)
    assert unit.dtype == np.float32
    np.testing.assert_allclose((unit.astype(float) ** 2).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(unit, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-6)


def test_a_unit_row_does_not_depend_on_its_neighbours():
    vectors = NUMBERS.standard_normal((9000, 700)).astype(np.float32)  # more than one block
    whole = unit_rows(vectors, 700)
    for at in (0, 5991, 5992, 8999):
        np.testing.assert_array_equal(unit_rows(vectors[at : at + 1], 700)[0], whole[at])


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_vector_without_direction_is_refused_by_name(bad):
    vectors = np.ones((4, 3), np.float32)
    vectors[2] = bad
    with pytest.raises(SettingsError, match="query vector 2 is zero or not finite"):
        unit_rows(vectors, 3)
    with pytest.raises(StoreError, match="the vector of key 77 is zero or not finite"):
        unit_rows(vectors, 3, np.array([5, 6, 77, 8]))


@pytest.mark.parametrize("shape", [(2, 3), (4,)])
def test_another_length_is_refused(shape):
    with pytest.raises(SettingsError, match=r"the index wants \[n, 4\]"):
        unit_rows(np.ones(shape, np.float32), 4)


@pytest.mark.parametrize("dim", [2, 192, 512])
@pytest.mark.parametrize("k", [1, 10, 60])
def test_answers_equal_brute_force_bit_for_bit(dim, k):
    rows = unit_rows(NUMBERS.standard_normal((60, dim)), dim)
    queries = unit_rows(NUMBERS.standard_normal((5, dim)), dim)
    keys = NUMBERS.permutation(1000)[:60]
    scores, found = exact_search(flat_over(rows), keys, queries, k)
    expected_scores, expected = brute_force(rows, keys, queries, k)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(found, expected)


def test_ties_at_rank_k_go_to_the_smaller_keys():
    one, other = np.eye(2, 8, dtype=np.float32)
    rows = np.vstack([np.tile(one, (200, 1)), other])  # 200 equal rows: more than FAISS is first asked for
    keys = np.concatenate([NUMBERS.permutation(200) + 100, [3]])
    scores, found = exact_search(flat_over(rows), keys, np.vstack([one, other]), 4)
    assert found.tolist() == [[100, 101, 102, 103], [3, 100, 101, 102]]
    assert scores.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


@given(
    rows=st.lists(st.tuples(*[st.integers(-2, 2)] * 3).filter(any), min_size=1, max_size=60),
    k=st.integers(1, 60),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_order_of_rows_and_size_of_query_batches_do_not_matter(rows, k, seed):
    vectors = unit_rows(np.array(rows, np.float32), 3)  # few directions: many ties
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    k, keys = min(k, len(rows)), np.arange(len(rows))
    together = exact_search(flat_over(vectors), keys, vectors, k)
    alone = [exact_search(flat_over(vectors[shuffled]), keys[shuffled], vectors[i : i + 1], k) for i in keys]
    np.testing.assert_array_equal(together[0], np.vstack([scores for scores, _ in alone]))
    np.testing.assert_array_equal(together[1], np.vstack([found for _, found in alone]))
    best = np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int64)
    for part in np.array_split(shuffled, 3):
        best = nearest(best, vectors[part], keys[part], vectors, k)
    candidates = np.tile(shuffled, (len(rows), 1))
    for found in (best, rescore(vectors, keys, vectors, candidates, k)):
        np.testing.assert_array_equal(found[0], together[0])
        np.testing.assert_array_equal(found[1], together[1])


def test_nearest_rows_and_candidates_are_scored_as_by_an_exact_search(monkeypatch):
    monkeypatch.setattr(exact, "_COMPARED_ROWS", 150)
    rows = unit_rows(np.repeat(NUMBERS.standard_normal((250, 64)), 3, axis=0), 64)  # each three times
    rows[1::3] *= np.float32(1 - 2**-23)  # so near that float32 products may order them wrongly
    queries, keys = unit_rows(NUMBERS.standard_normal((40, 64)), 64), NUMBERS.permutation(750)
    expected = exact_search(flat_over(rows), keys, queries, 20)
    start = np.empty((40, 0), np.float32), np.empty((40, 0), np.int64)
    at = np.argsort(-(queries.astype(float) @ rows.T.astype(float)), axis=1)[:, :120]
    at[:, 100:] = -1
    for found in (
        nearest(start, rows, keys, queries, 20),
        rescore(rows, keys, queries, NUMBERS.permuted(at, axis=1), 20),
    ):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    few = np.full((40, 120), -1)
    few[:, 5] = 3
    assert (rescore(rows, keys, queries, few, 20)[1][:, :2] == [keys[3], -1]).all()


def test_merging_two_answers_keeps_the_best_of_both():
    left = (np.array([[0.9, 0.5]], np.float32), np.array([[7, 4]]))
    right = (np.array([[0.7, 0.5]], np.float32), np.array([[1, 2]]))
    scores, keys = merge_best(left, right, 3)
    assert keys.tolist() == [[7, 1, 2]]
    np.testing.assert_array_equal(scores, np.array([[0.9, 0.7, 0.5]], np.float32))
