import numpy as np
import pytest
import torch

from metrics.cosine import SCORES_PER_UNIT, pair_scores, shift_to_grid, unit_rows


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_become_unit_vectors_of_float32(dtype: type) -> None:
    features = np.random.default_rng(0).normal(size=(50, 7)).astype(dtype)
    unit = unit_rows(features)
    assert unit.dtype == torch.float32
    expected = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(unit.numpy(), expected, atol=1e-7)


def test_norms_do_not_overflow_and_rows_can_be_reordered() -> None:
    features = np.array([[3e30, 4e30], [3e-30, 4e-30], [0.0, -2.0]], dtype=np.float32)
    unit = unit_rows(features, order=np.array([2, 0, 1]))
    np.testing.assert_allclose(unit.numpy(), [[0, -1], [0.6, 0.8], [0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("bad", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_a_row_without_direction_is_refused_by_number(bad: list[float]) -> None:
    features = np.ones((9000, 2))
    features[8500] = bad
    with pytest.raises(ValueError, match="feature row 8500 is zero or not finite"):
        unit_rows(features)
    with pytest.raises(ValueError, match="feature row 8500 "):
        unit_rows(features, order=np.arange(9000)[::-1])
    with pytest.raises(ValueError, match="shape"):
        unit_rows(np.ones(3))


def test_read_only_arrays_and_tensors_are_taken_without_a_warning() -> None:
    features = np.array([[3.0, 4.0], [0.0, 2.0]])
    expected = unit_rows(torch.from_numpy(features.copy()))
    features.setflags(write=False)
    assert torch.equal(unit_rows(features), expected)


def test_the_grid_is_coarser_than_float32_by_less_than_the_noise_of_a_product() -> None:
    cosines = torch.linspace(-1, 1, 100_001)
    rounded = shift_to_grid(cosines.clone()) - 3
    assert (rounded - cosines).abs().max() <= 0.5 / SCORES_PER_UNIT
    assert torch.equal((rounded * SCORES_PER_UNIT).round() / SCORES_PER_UNIT, rounded)
    assert torch.equal(shift_to_grid(torch.tensor([-1.0000002, 1.0000002])), torch.tensor([2.0, 4.0]))


def test_pair_scores_are_the_cosines_of_the_named_rows() -> None:
    random = np.random.default_rng(1)
    features = random.normal(size=(300, 16)) * random.uniform(0.1, 90, size=(300, 1))
    first, second = random.integers(0, 300, size=(2, 20_000))
    scores = pair_scores(features, first, second)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, (unit[first] * unit[second]).sum(axis=1), atol=4e-7)
    with pytest.raises(ValueError, match="one length"):
        pair_scores(features, first, second[1:])
