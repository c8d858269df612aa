"""Fast-scan codes with refinement: scores are those of the vectors, any history keeps rows and keys together."""

import io

import faiss
import numpy as np
import pytest

from schemas.errors import StoreError
from schemas.index import IndexSettings
from storage.vectors.files import write_faiss
from storage.vectors.index import VectorIndex, build, read_index
from storage.vectors.recall import audit_recall

KIND = "IVF16,PQ16x4fs,RFlat"
PROJECTED = "PCAR32,IVF16,PQ8x4fs,RFlat"
NUMBERS = np.random.default_rng(1)
CENTRES = NUMBERS.standard_normal((300, 64))
KEYS = NUMBERS.choice(2**62, 3000, replace=False)
VECTORS = (2 * np.repeat(CENTRES, 10, axis=0) + NUMBERS.standard_normal((3000, 64))).astype(np.float32)
QUERIES = (2 * CENTRES + NUMBERS.standard_normal((300, 64))).astype(np.float32)


def built(factory: str = KIND, rows: int = 3000, size: int = 500) -> VectorIndex:
    batches = [(KEYS[at : min(at + size, rows)], VECTORS[at : min(at + size, rows)]) for at in range(0, rows, size)]
    return build(lambda: iter(batches), rows, 64, IndexSettings(factory=factory, nprobe=16))


def written(index: VectorIndex) -> bytes:
    file = io.BytesIO()
    index.write(file)
    return file.getvalue()


def test_answers_are_those_of_an_exact_search_with_its_scores() -> None:
    scores, keys = built().search(QUERIES, 10)
    true_scores, true_keys = built("Flat").search(QUERIES, 10)
    assert (keys == true_keys).mean() > 0.98
    np.testing.assert_array_equal(scores[keys == true_keys], true_scores[keys == true_keys])
    assert (np.diff(scores, axis=1) <= 0).all()


def test_a_projection_keeps_the_inner_products_and_so_the_mean_of_the_vectors() -> None:
    # All rows are about in one direction, and lie in 16 dimensions: a projection to 32 loses nothing.
    basis = np.linalg.qr(NUMBERS.standard_normal((64, 64)))[0][:16]
    rows = ((NUMBERS.standard_normal((3000, 16)) + 1) @ basis).astype(np.float32)
    index = build(lambda: iter([(KEYS, rows)]), 3000, 64, IndexSettings(factory=PROJECTED, nprobe=16))
    codes = faiss.downcast_index(faiss.downcast_index(index._index.index).base_index)
    projected = faiss.downcast_VectorTransform(codes.chain.at(0)).apply(rows)
    np.testing.assert_allclose(projected @ projected.T, rows @ rows.T, atol=1e-3)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert (index.candidates(unit, 64) == KEYS[:, None]).any(axis=1).mean() > 0.99
    file = io.BytesIO()
    index.propose(32)
    proof = index.write(file)
    file.seek(0)
    again = read_index(file, proof.digest, proof.size)
    assert again._refined._refine.k_factor == 32
    np.testing.assert_array_equal(again.search(rows[:50], 5)[1], index.search(rows[:50], 5)[1])


def test_recall_is_measured_from_its_own_vectors() -> None:
    def unread():
        raise AssertionError("the rows are in the index")

    assert audit_recall(built(), unread, QUERIES).at_10 > 0.98


def test_the_cut_into_batches_does_not_change_a_byte() -> None:
    assert written(built(size=3000)) == written(built(size=170))


def test_rows_are_removed_replaced_and_added_under_their_keys() -> None:
    index = built(rows=2000)
    assert index.can_update
    index.update(KEYS[100:900], [(KEYS[2000:], VECTORS[2000:])])
    index.update(KEYS[:50], [(KEYS[900:1000], -VECTORS[900:1000])])  # present keys: replaced
    left = np.concatenate([KEYS[50:100], KEYS[900:]])
    assert index.keys().tolist() == sorted(left.tolist())
    content = written(index)
    again = read_index(io.BytesIO(content), index.write(io.BytesIO()).digest, len(content))
    for one in (index, again):
        scores, found = one.search(np.vstack([VECTORS[50:100], -VECTORS[900:1000], VECTORS[1000:]]), 1)
        assert (found[:, 0] == left).mean() > 0.99
        np.testing.assert_allclose(scores[found[:, 0] == left], 1, atol=1e-6)


@pytest.mark.parametrize("factory", [KIND, PROJECTED, "IVF16,PQ16x4fs"])
def test_rows_removed_and_added_again_are_found_as_before(factory: str) -> None:
    index = built(factory)
    before = index.search(VECTORS, 10)[1]
    index.update(KEYS[100:1900])
    index.update(KEYS[:0], [(KEYS[100:1900], VECTORS[100:1900])])
    after = index.search(VECTORS, 10)[1]
    assert (before[:, 0] == after[:, 0]).mean() > 0.99
    assert (before == after).mean() > 0.97


def test_all_rows_can_be_removed() -> None:
    index = built()
    index.update(KEYS)
    assert (len(index), index.keys().tolist()) == (0, [])
    assert (index.search(QUERIES[:1], 3)[1] == -1).all()


@pytest.mark.parametrize("damage", ["keys", "count", "label", "vectors"])
def test_an_index_that_points_outside_of_its_rows_is_refused(damage: str) -> None:
    index = built()._index
    refine = faiss.downcast_index(index.index)
    if damage == "keys":
        faiss.copy_array_to_vector(KEYS[:10], index.id_map)
    elif damage == "count":
        index.ntotal = 5000
    elif damage == "label":
        lists = faiss.try_extract_index_ivf(refine.base_index)
        faiss.rev_swig_ptr(lists.invlists.get_ids(0), 1)[:] = 10**9
    else:
        faiss.downcast_index(refine.refine_index).remove_ids(np.arange(10))
    file = io.BytesIO()
    proof = write_faiss(index, file)
    file.seek(0)
    with pytest.raises(StoreError, match=r"keys are not those of its rows|not an index that this FAISS"):
        read_index(file, proof.digest, proof.size)
