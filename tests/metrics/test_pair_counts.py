"""Counters are compared with a whole matrix of scores; signs in 64 dimensions make every cosine an exact k/32."""

import numpy as np
import pytest
import torch

from metrics import pair_counts as module
from metrics.pair_counts import COARSE_BINS, GRID_POINTS, CellCounts, Rows, count_pairs

N_ROWS, N_CLUSTERS = 1100, 9
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(params=["cpu", *(pytest.param(way, marks=NEEDS_GPU) for way in ("kernel", "steps on a GPU"))])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way of counting: on the CPU, with the GPU's kernel, and on a GPU where no kernel can be compiled."""
    if request.param == "steps on a GPU":
        monkeypatch.setattr(module, "count_tile", lambda **_: None)
    return "cpu" if request.param == "cpu" else "cuda"


@pytest.fixture(scope="module")
def signs() -> np.ndarray:
    return np.random.default_rng(0).choice([-1.0, 1.0], (N_ROWS, 64)).astype(np.float32)


@pytest.fixture
def rows(signs: np.ndarray, device: str) -> Rows:
    """Two classes of 700 and 400 rows; three subjects a cluster; every 50th row is a duplicate of another."""
    random = np.random.default_rng(1)
    subject = np.concatenate([np.sort(random.integers(0, 27, 700)), np.sort(random.integers(0, 27, 400))])
    duplicate = np.arange(N_ROWS)
    duplicate[::50] = random.integers(0, N_ROWS, len(duplicate[::50]))
    unit = torch.from_numpy(signs / 8).to(device)
    return Rows(unit, subject // 3, subject, np.array([0, 700, N_ROWS]), duplicate, N_CLUSTERS)


def by_matrix(rows: Rows, first: int, second: int) -> CellCounts:
    unit = rows.unit.cpu().double()
    scores = (unit @ unit.T).numpy()
    class_of_row = np.repeat([0, 1], np.diff(rows.starts))
    one, other = np.triu_indices(N_ROWS, 1)
    inside = (class_of_row[one] == first) & (class_of_row[other] == second)
    inside &= rows.duplicate[one] != rows.duplicate[other]
    one, other = one[inside], other[inside]
    grid = ((scores[one, other] + 1) * 2**22).astype(np.int64)
    same = rows.subject[one] == rows.subject[other]
    impostor = np.bincount(grid[~same], minlength=GRID_POINTS)
    genuine_by_cluster, ends = np.zeros((2, N_CLUSTERS, COARSE_BINS), dtype=np.int64)
    np.add.at(genuine_by_cluster, (rows.cluster[one[same]], grid[same] >> 12), 1)
    for end in (one[~same], other[~same]):
        np.add.at(ends, (rows.cluster[end], grid[~same] >> 12), 1)
    return CellCounts(impostor, np.sort(grid[same]), genuine_by_cluster, ends)


def assert_counts(rows: Rows, workers: int = 2) -> None:
    cells = list(count_pairs(rows, workers))
    assert [cell[:2] for cell in cells] == [(0, 0), (0, 1), (1, 1)]
    for first, second, counts in cells:
        expected = by_matrix(rows, first, second)
        for name in ("impostor", "genuine", "genuine_by_cluster", "ends_by_cluster"):
            np.testing.assert_array_equal(getattr(counts, name), getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_pair_is_counted_once_in_its_cell_and_for_its_clusters(rows: Rows, workers: int) -> None:
    assert_counts(rows, workers)


@pytest.mark.parametrize("tile", [(7, 13), (64, 50), (300, 1000)])
def test_the_shape_of_a_tile_changes_nothing(
    rows: Rows, device: str, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module._TILE, device, tile)
    assert_counts(rows)


def test_counters_are_emptied_into_wider_ones_before_they_can_overflow(
    rows: Rows, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module._TILE, device, (100, 100))
    monkeypatch.setattr(module, "_FLUSH_AT", 25_000)
    assert_counts(rows)
    widths = {counts.impostor.dtype for _, _, counts in count_pairs(rows, 2)}
    assert widths == {np.dtype(np.int64)}


def test_scores_of_equal_and_of_opposite_rows_have_their_places_at_the_ends(device: str) -> None:
    unit = torch.tensor([[0.6, 0.8], [0.6, 0.8], [-0.6, -0.8]], device=device)
    rows = Rows(unit, np.arange(3), np.arange(3), np.array([0, 3]), np.arange(3), 3)
    ((_, _, counts),) = count_pairs(rows, 1)
    assert np.flatnonzero(counts.impostor).tolist() == [0, GRID_POINTS - 1]
    assert counts.ends_by_cluster[:, 0].tolist() == [1, 1, 2]
    assert counts.ends_by_cluster[:, -1].tolist() == [1, 1, 0]


def test_a_class_without_rows_makes_no_cell_and_one_row_makes_no_pair(device: str) -> None:
    unit = torch.eye(3, device=device)
    rows = Rows(unit, np.arange(3), np.arange(3), np.array([0, 2, 2, 3]), np.arange(3), 3)
    counted = {(first, second): int(counts.impostor.sum()) for first, second, counts in count_pairs(rows, 2)}
    assert counted == {(0, 0): 1, (0, 2): 2, (2, 2): 0}


def test_the_thread_setting_of_torch_is_put_back_even_when_the_work_fails(
    rows: Rows, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    list(count_pairs(rows, 2))
    assert torch.get_num_threads() == before
    monkeypatch.setitem(module._TILE, device, (0, 1))
    with pytest.raises(ValueError, match="must not be zero"):
        list(count_pairs(rows, 2))
    assert torch.get_num_threads() == before
