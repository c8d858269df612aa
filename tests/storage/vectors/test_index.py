"""The index as its users see it: chosen, built, updated, searched, written and read."""

import io

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import SettingsError, StoreError
from schemas.index import IndexSettings
from storage.vectors.files import write_faiss
from storage.vectors.index import EXACT_ROWS, build, choose_factory, read_index, rebuild_reason
from storage.vectors.recall import audit_recall

AUTO = IndexSettings()
NO_KEYS = np.empty(0, np.int64)
LISTS = ["IVF8,Flat", "IVF8,SQ8", "IVF8,PQ16x4", "PCAR24,IVF8,SQ8", "PCAR16,IVF8,PQ4x4fs,RFlat"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def make_rows(count, dim, seed=0):
    """Ten rows around each of count/10 centres, at scattered keys, lengths other than 1."""
    numbers = np.random.default_rng(seed)
    centres = np.repeat(numbers.standard_normal((-(-count // 10), dim)), 10, axis=0)[:count]
    vectors = (3 * centres + numbers.standard_normal((count, dim))).astype(np.float32)
    return numbers.choice(2**62, count, replace=False), vectors


def stream(keys, vectors, size=64):
    return lambda: ((keys[at : at + size], vectors[at : at + size]) for at in range(0, len(keys), size))


def built(keys, vectors, factory="auto", **choices):
    settings = IndexSettings(factory=factory, training_rows=choices.pop("training_rows", 1000), **choices)
    return build(stream(keys, vectors), len(keys), vectors.shape[1], settings)


def bytes_of(index):
    file = io.BytesIO()
    return file, index.write(file)


def nearest(vectors, keys, queries, k):
    """Keys of the k best by cosine, from NumPy alone."""
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ).T
    return keys[np.argsort(-cosines, axis=1)[:, :k]], -np.sort(-cosines, axis=1)[:, :k]


class TestChoice:
    @pytest.mark.parametrize(
        ("rows", "dim", "budget", "expected"),
        [
            (1, 512, 16, "Flat"),
            (EXACT_ROWS, 512, 16, "Flat"),
            (EXACT_ROWS + 1, 512, 16, "PCAR256,IVF512,PQ64x4fs,RFlat"),
            (2_000_000, 192, 16, "PCAR96,IVF2048,PQ24x4fs,RFlat"),  # 1.7 GB
            (2_000_000, 190, 16, "IVF2048,Flat"),  # eight does not divide 190
            (20_000_000, 192, 20, "PCAR96,IVF4096,PQ24x4fs,RFlat"),  # 17.4 GB; training_rows = 262,144 feed 6,553 lists
            (20_000_000, 512, 16, "IVF4096,SQ8"),  # 41 GB whole, 10.4 at a byte a number
            (40_000_000, 512, 16, "IVF4096,PQ256"),  # 20.8 at a byte, 10.6 at half a byte
            (1_000_000_000, 512, 30, "IVF4096,PQ16"),
            (200_000, 512, 0.3, "IVF512,SQ8"),  # few rows, but too many for this budget as they are
        ],
    )
    def test_the_least_compressed_kind_that_fits(self, rows, dim, budget, expected):
        assert choose_factory(rows, dim, IndexSettings(memory_budget_gb=budget)) == expected

    def test_more_training_rows_allow_more_lists(self):
        for training_rows, lists in ((262_144, 4096), (2_000_000, 32_768)):
            settings = IndexSettings(training_rows=training_rows, memory_budget_gb=1000)
            assert choose_factory(500_000_000, 192, settings) == f"PCAR96,IVF{lists},PQ24x4fs,RFlat"

    @pytest.mark.parametrize("dim", [8, 100, 192, 126, 512])
    def test_what_is_chosen_can_be_made(self, dim):
        for budget in (100, 3, 1.5, 1, 0.6):
            kind = choose_factory(5_000_000, dim, IndexSettings(memory_budget_gb=budget))
            assert faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT).d == dim

    def test_a_budget_below_any_kind_is_refused_with_what_is_needed(self):
        with pytest.raises(SettingsError, match=r"memory_budget_gb = 0.1 is too small .* needs 0.2\d+ GB"):
            choose_factory(10_000_000, 512, IndexSettings(memory_budget_gb=0.1))

    @pytest.mark.parametrize("factory", ["Flat", "IVF16,SQ8", "HNSW32", "OPQ64,IVF1024,PQ64"])
    def test_an_override_is_taken_as_it_is(self, factory):
        assert choose_factory(10**9, 512, IndexSettings(factory=factory)) == factory

    @pytest.mark.parametrize(
        "factory", ["nonsense", "IVF16", "LSH", "IVF16,PQ7", "IDMap,Flat", "IVF99999999999,Flat", " "]
    )
    def test_a_string_that_cannot_be_made_is_refused_by_name(self, factory):
        with pytest.raises(SettingsError, match="factory = ") as refusal:
            choose_factory(1000, 512, IndexSettings(factory=factory))
        assert repr(factory) in str(refusal.value)


class TestBuild:
    @pytest.mark.parametrize("dim", [192, 512])
    def test_auto_on_few_rows_answers_as_brute_force(self, dim):
        keys, vectors = make_rows(300, dim)
        index = built(keys, vectors)
        queries = vectors[::30] + 1
        scores, found = index.search(queries, 7)
        expected, cosines = nearest(vectors, keys, queries, 7)
        assert index.is_exact
        assert (len(index), index.dim) == (300, dim)
        assert (scores.dtype, found.dtype) == (np.float32, np.int64)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(scores, cosines, atol=1e-6)

    @pytest.mark.parametrize("factory", [*LISTS, "HNSW16", "IVF8,SQ8,RFlat", "PCA24,Flat", "SQ8"])
    def test_every_kind_finds_most_neighbours_under_their_keys(self, factory):
        keys, vectors = make_rows(1500, 32)
        index = built(keys, vectors, factory, nprobe=8)
        expected, _ = nearest(vectors, keys, vectors[::10] + 0.1, 1)
        _, found = index.search(vectors[::10] + 0.1, 10)
        assert (found == expected).any(axis=1).mean() > 0.9

    @pytest.mark.parametrize("factory", ["Flat", *LISTS])
    def test_the_same_stream_gives_the_same_bytes(self, factory):
        keys, vectors = make_rows(1000, 32)
        first, again = (bytes_of(built(keys, vectors, factory, seed=3))[1].digest for _ in range(2))
        assert first == again

    def test_the_training_sample_does_not_depend_on_the_batches(self):
        keys, vectors = make_rows(1000, 32)
        settings = IndexSettings(factory="IVF8,Flat", training_rows=1000, seed=3)
        indexes = [build(stream(keys, vectors, size), 1000, 32, settings) for size in (1000, 300, 37)]
        centres = [faiss.downcast_index(index._index.quantizer).reconstruct_n(0, 8) for index in indexes]
        np.testing.assert_array_equal(centres[0], centres[1])
        np.testing.assert_array_equal(centres[0], centres[2])

    def test_the_seed_draws_the_sample_and_the_clusters(self):
        keys, vectors = make_rows(1200, 32)
        assert len({bytes_of(built(keys, vectors, "IVF8,Flat", seed=seed))[1].digest for seed in (1, 2)}) == 2

    def test_training_sees_rows_of_all_batches(self):
        # the last tenth is in a corner of its own; lists learned from the first rows would have no centre there
        numbers = np.random.default_rng(0)
        vectors = numbers.standard_normal((4000, 16)).astype(np.float32)
        vectors[:, 0] = 5
        vectors[3600:, 0] = -5
        index = built(np.arange(4000), vectors, "IVF16,Flat", training_rows=1000)
        centres = faiss.downcast_index(index._index.quantizer).reconstruct_n(0, 16)
        assert (centres[:, 0] < 0).any()
        assert (centres[:, 0] > 0).any()

    def test_no_rows_and_one_row(self):
        empty = build(lambda: iter(()), 0, 8, AUTO)
        assert len(empty) == 0
        assert empty.search(np.ones((2, 8), np.float32), 3)[1].tolist() == [[-1] * 3] * 2
        empty.update(NO_KEYS, [(np.array([4]), np.ones((1, 8), np.float32))])
        assert empty.search(np.ones((1, 8), np.float32), 2)[1].tolist() == [[4, -1]]
        one = built(np.array([7]), np.full((1, 8), 2, np.float32))
        scores, found = one.search(np.ones((1, 8), np.float32), 3)
        assert found.tolist() == [[7, -1, -1]]
        np.testing.assert_allclose(scores, [[1, -np.inf, -np.inf]], atol=1e-6)

    def test_what_a_search_visits_is_kept_in_the_file(self):
        keys, vectors = make_rows(400, 16)

        def kept(factory):
            file, proof = bytes_of(built(keys, vectors, factory, nprobe=5, ef_search=55))
            file.seek(0)
            return read_index(file, proof.digest, proof.size)._index

        assert faiss.extract_index_ivf(kept("IVF8,Flat")).nprobe == 5
        graph = kept("HNSW8")
        assert faiss.downcast_index(graph.index).hnsw.efSearch == 55

    @pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,PQ4x4fs,RFlat"])
    def test_rows_that_cannot_be_indexed_are_refused(self, factory):
        keys, vectors = make_rows(200, 16)
        zero = vectors.copy()
        zero[150] = 0
        with pytest.raises(StoreError, match=f"key {keys[150]} is zero or not finite"):
            built(keys, zero, factory)
        with pytest.raises(StoreError, match=r"\[64, 16\], the index wants \[n, 12\]"):
            build(stream(keys, vectors), 200, 12, IndexSettings(factory=factory))
        twice = keys.copy()
        twice[199] = keys[0]
        with pytest.raises(StoreError, match=f"key {keys[0]} comes twice"):
            built(twice, vectors, factory)
        negative = keys.copy()
        negative[3] = -1
        with pytest.raises(StoreError, match="key -1 is negative"):
            built(negative, vectors, factory)
        with pytest.raises(ValueError, match="not int64"):
            built(keys.astype(np.int32), vectors, factory)

    @pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,PQ4x4fs,RFlat"])
    @pytest.mark.parametrize("promised", [199, 201])
    def test_a_stream_of_another_length_than_promised_is_refused(self, factory, promised):
        keys, vectors = make_rows(200, 16)
        with pytest.raises(StoreError, match=f"^{promised} rows were announced for the index but 200 came"):
            build(stream(keys, vectors), promised, 16, IndexSettings(factory=factory))

    def test_too_few_rows_for_the_lists_asked_for(self):
        keys, vectors = make_rows(20, 16)
        with pytest.raises(SettingsError, match="'IVF64,Flat' cannot be trained on 20 rows"):
            built(keys, vectors, "IVF64,Flat")

    @pytest.mark.gpu
    @pytest.mark.skipif(not faiss.get_num_gpus(), reason="no CUDA device, or FAISS without GPU support")
    def test_training_on_a_gpu_finds_as_many_neighbours(self):
        keys, vectors = make_rows(20_000, 64)
        recalls = [
            audit_recall(built(keys, vectors, "IVF64,Flat", gpu=gpu), stream(keys, vectors, 5000), vectors[:200] + 1)
            for gpu in ("auto", "never")
        ]
        assert abs(recalls[0].at_10 - recalls[1].at_10) < 0.05


class TestUpdate:
    @given(
        steps=st.lists(
            st.tuples(st.lists(st.integers(0, 29), max_size=8), st.lists(st.integers(0, 29), unique=True, max_size=8)),
            max_size=6,
        ),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=50, deadline=None)
    def test_any_history_of_an_exact_index_answers_as_a_rebuild(self, steps, seed):
        numbers = np.random.default_rng(seed)
        expected = {}
        index = build(lambda: iter(()), 0, 4, AUTO)
        for removed, added in steps:
            vectors = numbers.integers(1, 4, (len(added), 4)).astype(np.float32)  # few values: ties
            index.update(np.array(removed, np.int64), stream(np.array(added, np.int64), vectors, 3)())
            expected = {key: vector for key, vector in expected.items() if key not in removed}
            expected |= dict(zip(added, vectors, strict=True))
        keys = np.array(sorted(expected), np.int64)
        rebuilt = built(keys, np.array([expected[key] for key in keys.tolist()], np.float32).reshape(-1, 4))
        queries = numbers.standard_normal((5, 4)).astype(np.float32)
        for answer, wanted in zip(index.search(queries, 9), rebuilt.search(queries, 9), strict=True):
            np.testing.assert_array_equal(answer, wanted)

    @pytest.mark.parametrize("factory", ["Flat", *LISTS])
    def test_rows_go_come_and_are_replaced_after_reading_back(self, factory):
        keys, vectors = make_rows(1200, 32)
        file, proof = bytes_of(built(keys[:1000], vectors[:1000], factory, nprobe=8))
        file.seek(0)
        index = read_index(file, proof.digest, proof.size)
        index.update(keys[:100], stream(keys[900:], -vectors[900:])())
        assert len(index) == 1100
        assert index.keys().tolist() == sorted(keys[100:].tolist())
        _, found = index.search(np.vstack([vectors[:100], -vectors[900:]]), 1100)
        assert set(found[0].tolist()) == set(keys[100:].tolist())
        assert (found[100:, :10] == keys[900:, None]).any(axis=1).mean() > 0.9

    @pytest.mark.parametrize("factory", [
        "IVF16,PQ8x4fs", "IVF16,PQ8x4", "IVF16,SQ8", "IVF16,Flat", "Flat", "HNSW8",
        "IVF16,PQ8x4fs,RFlat", "IVF16,PQ8x4fs,Refine(SQ8)",
    ])  # fmt: skip
    def test_keys_of_every_kind_are_those_of_the_rows(self, factory):
        keys, vectors = make_rows(900, 32)
        assert built(keys, vectors, factory).keys().tolist() == sorted(keys.tolist())

    def test_keys_that_are_not_there_are_passed_over(self):
        keys, vectors = make_rows(50, 8)
        index = built(keys, vectors)
        index.update(np.array([1, 2, 3]))
        assert len(index) == 50

    @pytest.mark.parametrize("factory", ["Flat", *LISTS])
    def test_kinds_with_lists_can_remove(self, factory):
        assert built(*make_rows(1000, 32), factory=factory).can_update

    @pytest.mark.parametrize("factory", ["HNSW8", "HNSW8,RFlat", "IVF8,PQ8x4fs,Refine(SQ8)"])
    def test_kinds_that_cannot_remove_say_so(self, factory):
        keys, vectors = make_rows(1000, 32)
        index = built(keys, vectors, factory)
        assert not index.can_update
        with pytest.raises(StoreError, match="cannot remove rows; rebuild it"):
            index.update(keys[:1])

    def test_rows_are_checked_as_in_a_build(self):
        keys, vectors = make_rows(50, 8)
        index = built(keys, vectors)
        with pytest.raises(StoreError, match="key 5 comes twice"):
            index.update(NO_KEYS, [(np.array([5, 5]), vectors[:2])])
        with pytest.raises(StoreError, match="the vector of key 9 is zero"):
            index.update(NO_KEYS, [(np.array([9]), np.zeros((1, 8), np.float32))])


class TestSearch:
    @pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW8"])
    def test_more_neighbours_than_rows(self, factory):
        keys, vectors = make_rows(400, 16)
        index = built(keys, vectors, factory, nprobe=8, ef_search=400)
        scores, found = index.search(vectors[:3], 450)
        assert (found[:, 400:] == -1).all()
        assert np.isneginf(scores[found < 0]).all()
        assert np.isfinite(scores[found >= 0]).all()
        assert (scores[:, 1:] <= scores[:, :-1]).all()

    @pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat"])
    def test_equal_scores_go_by_key(self, factory):
        keys = np.random.default_rng(1).permutation(80)
        vectors = np.tile(np.eye(2, 8, dtype=np.float32), (40, 1))
        scores, found = built(keys, vectors, factory, nprobe=2).search(np.eye(2, 8, dtype=np.float32), 40)
        assert found.tolist() == [sorted(keys[0::2].tolist()), sorted(keys[1::2].tolist())]
        assert (scores == 1).all()

    def test_the_length_of_a_query_does_not_matter(self):
        keys, vectors = make_rows(100, 16)
        index = built(keys, vectors)
        for answer, scaled in zip(index.search(vectors, 5), index.search(vectors * 1024, 5), strict=True):
            np.testing.assert_array_equal(answer, scaled)

    def test_no_queries_and_bad_queries(self):
        keys, vectors = make_rows(20, 8)
        index = built(keys, vectors)
        assert index.search(np.empty((0, 8), np.float32), 3)[0].shape == (0, 3)
        with pytest.raises(SettingsError, match="query vector 1 is zero"):
            index.search(np.vstack([vectors[:1], np.zeros((1, 8), np.float32)]), 3)
        with pytest.raises(SettingsError, match=r"query vectors have shape \[1, 9\], the index wants \[n, 8\]"):
            index.search(np.ones((1, 9), np.float32), 3)
        with pytest.raises(ValueError, match="k is 0"):
            index.search(vectors, 0)


class TestFile:
    @pytest.mark.parametrize("factory", ["Flat", *LISTS, "HNSW8"])
    def test_what_is_read_answers_as_what_was_written(self, factory):
        keys, vectors = make_rows(1000, 32)
        index = built(keys, vectors, factory)
        file, proof = bytes_of(index)
        file.seek(0)
        again = read_index(file, proof.digest, proof.size)
        for answer, wanted in zip(again.search(vectors[:20], 5), index.search(vectors[:20], 5), strict=True):
            np.testing.assert_array_equal(answer, wanted)

    def test_a_foreign_index_is_refused(self):
        for foreign in (faiss.IndexFlatIP(8), faiss.IndexIDMap2(faiss.IndexFlatL2(8))):
            file = io.BytesIO()
            proof = write_faiss(foreign, file)
            file.seek(0)
            with pytest.raises(StoreError, match=r"old\.faiss is an index of kind"):
                read_index(file, proof.digest, proof.size, "old.faiss")

    def test_a_damaged_file_is_refused(self):
        file, proof = bytes_of(built(*make_rows(10, 8)))
        file.getbuffer()[50] ^= 1
        file.seek(0)
        with pytest.raises(StoreError, match="damaged"):
            read_index(file, proof.digest, proof.size)


class TestRebuildReason:
    def test_an_exact_index_is_rebuilt_only_for_another_kind(self):
        index = built(*make_rows(100, 8))
        assert rebuild_reason(index, "Flat", 90, 190, AUTO) is None
        assert "want PCAR4,IVF1024,PQ1x4fs,RFlat" in (rebuild_reason(index, "Flat", EXACT_ROWS * 2, 1, AUTO) or "")

    def test_trained_kinds_age(self):
        settings = IndexSettings(factory="IVF8,Flat", rebuild_share=0.2)
        index = built(*make_rows(1000, 16), factory="IVF8,Flat")
        assert rebuild_reason(index, "IVF8,Flat", 1000, 200, settings) is None
        assert "201 rows changed" in (rebuild_reason(index, "IVF8,Flat", 1000, 201, settings) or "")

    def test_a_graph_is_always_rebuilt(self):
        index = built(*make_rows(100, 16), factory="HNSW8")
        assert "cannot remove" in (rebuild_reason(index, "HNSW8", 100, 0, IndexSettings(factory="HNSW8")) or "")

    def test_no_rows_want_an_empty_exact_index(self):
        index = built(*make_rows(1000, 16), factory="IVF8,Flat")
        assert "want Flat" in (rebuild_reason(index, "IVF8,Flat", 0, 1000, IndexSettings(factory="IVF8,Flat")) or "")
