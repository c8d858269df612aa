"""Training of an index: which rows it is trained on, and how; and the stream of rows that it is made of.

Which kind is trained is `storage.vectors.index`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import faiss
import numpy as np

from schemas.errors import SettingsError, StoreError
from schemas.index import IndexSettings
from storage.vectors.exact import unit_rows

Batch = tuple[np.ndarray, np.ndarray]
"""Keys, int64 `[n]`, and their vectors, float32 `[n, D]`; the vectors need not be normalised."""
Batches = Callable[[], Iterable[Batch]]
"""Each call starts a fresh pass over the same rows in the same order: training reads them before they are added."""

ROWS_PER_LIST = 40
"""Training rows for a list: FAISS warns below 39, and recall does not grow above (docs/index.md)."""
LEAST_TRAINING_ROWS = 16_384
ITERATIONS = 6
"""Of the clustering; recall does not grow above (docs/index.md)."""


def train(index: Any, sample: np.ndarray, factory: str, settings: IndexSettings) -> None:
    """Train an index on unit vectors, float32 `[n, D]`.

    Raises:
        SettingsError: the kind needs more rows, or cannot be trained; `factory` names it.
    """
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        first = faiss.downcast_VectorTransform(chain.at(0)) if chain.size() == 1 else None
        if isinstance(first, faiss.PCAMatrix):
            _project(first, sample, settings.seed)
            train(faiss.downcast_index(index.index), first.apply(sample), factory, settings)
            index.is_trained = True
            return
    lists = lists_of(index)
    if lists is not None and settings.gpu == "auto" and faiss.get_num_gpus() > 0:
        # the clusters are found on the GPU, by far the longest part; the index itself stays in main memory
        on_gpu = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(lists.d))  # FAISS borrows it: the name keeps it alive
        lists.clustering_index = on_gpu
    threads = faiss.omp_get_max_threads()
    try:
        if isinstance(index, faiss.IndexIVFPQFastScan):
            index.train_q1(len(sample), faiss.swig_ptr(sample), False, index.metric_type)  # type: ignore[attr-defined]
            # The code books are many tiny problems: a team of two threads took 5 to 14 s of CPU for 0.8 s of one.
            faiss.omp_set_num_threads(1)
        index.train(sample)
    except RuntimeError as error:
        reason = str(error).rsplit(": ", 1)[-1]
        raise SettingsError(
            f"factory = {factory!r} cannot be trained on {len(sample):,} rows ({reason}); raise training_rows, or "
            "choose a kind with fewer lists or codes"
        ) from error
    finally:
        faiss.omp_set_num_threads(threads)
        if lists is not None:
            lists.clustering_index = None


def _project(matrix: Any, sample: np.ndarray, seed: int) -> None:
    """Train a projection to the main directions of `sample`, rotated at random where the kind says so.

    FAISS would subtract the mean first. That changes the order of inner products, and the vectors' mean is among the
    directions. The rotation spreads what the first directions hold over all codes.
    """
    moments = sample.T @ sample
    directions = np.linalg.eigh(moments.astype(np.float64))[1][:, ::-1][:, : matrix.d_out].T
    if matrix.random_rotation:
        random = np.random.default_rng(seed).standard_normal((matrix.d_out, matrix.d_out))
        directions = np.linalg.qr(random)[0] @ directions
    faiss.copy_array_to_vector(np.ascontiguousarray(directions, np.float32).ravel(), matrix.A)
    matrix.have_bias, matrix.is_trained = False, True


def training_rows(index: Any, rows: int, settings: IndexSettings) -> np.ndarray:
    """Return the numbers of the rows to train on, ascending: drawn with equal chance, no more than recall needs."""
    lists = lists_of(index)
    wanted = max(LEAST_TRAINING_ROWS, ROWS_PER_LIST * (0 if lists is None else lists.nlist))
    count = min(rows, settings.training_rows, wanted)
    chosen: np.ndarray = np.sort(np.random.default_rng(settings.seed).choice(rows, count, replace=False))
    return chosen


def training_sample(batches: Batches, rows: int, dim: int, chosen: np.ndarray) -> np.ndarray:
    """Take the chosen rows of all batches, by position in the stream, however it is cut into batches."""
    sample = np.empty((len(chosen), dim), np.float32)
    filled = start = 0
    for keys, vectors in batches():
        check_keys(keys, vectors)
        end = int(np.searchsorted(chosen, start + len(keys)))
        here = chosen[filled:end] - start
        sample[filled:end] = unit_rows(vectors[here], dim, keys[here])
        filled, start = end, start + len(keys)
        if filled == len(chosen):
            return sample
    refuse_other_count(rows, start)
    return sample


def read_all(batches: Batches, vectors: np.ndarray, all_keys: np.ndarray) -> None:
    """Fill `vectors` `[rows, D]`, at length 1, and `all_keys` `[rows]` from one pass."""
    rows, dim = vectors.shape
    start = 0
    for keys, found in batches():
        check_keys(keys, found)
        end = start + len(keys)
        if end <= rows:
            all_keys[start:end], vectors[start:end] = keys, unit_rows(found, dim, keys)
        start = end
    refuse_other_count(rows, start)


def check_keys(keys: np.ndarray, vectors: np.ndarray) -> None:
    """Refuse keys that are not one for each vector, or negative: FAISS answers −1 for none."""
    if keys.dtype != np.int64 or keys.shape != vectors.shape[:1]:
        raise ValueError(f"keys are {keys.dtype} {list(keys.shape)} for vectors {list(vectors.shape)}, not int64 [n]")
    if len(keys) and keys.min() < 0:
        raise StoreError(f"key {keys.min()} is negative; make keys with id_keys")


def refuse_other_count(announced: int, came: int) -> None:
    """Refuse a stream that had another number of rows than was announced."""
    if came != announced:
        raise StoreError(
            f"{announced:,} rows were announced for the index but {came:,} came; the features changed meanwhile"
        )


def lists_of(index: Any) -> Any | None:
    """Return the inverted lists inside an index, or None if it has none."""
    return faiss.try_extract_index_ivf(index)
