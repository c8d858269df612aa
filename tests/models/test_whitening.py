"""The whitened row that is mixed into front: the map against plain NumPy, and what it leaves alone."""

import numpy as np
import pytest
import torch

from models.dual_branch import DualBranchEnsemble
from models.whitening import Whitening, within_class_map

DIM = 12


def rows(paired: int = 20, other_only: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Subjects with 2 to 4 rows a view, some without a profile row, in random order."""
    random = np.random.default_rng(seed)
    x, subjects, profile = [], [], []
    for subject in range(paired + other_only):
        centre = 3 * random.normal(size=DIM)
        for side in (False, True) if subject < paired else (False,):
            count = int(random.integers(2, 5))
            x.append(centre + 2 * side + random.normal(size=(count, DIM)) * np.linspace(0.2, 2, DIM))
            subjects += [subject] * count
            profile += [side] * count
    order = random.permutation(len(subjects))
    return (
        torch.from_numpy(np.concatenate(x)[order].astype(np.float32)),
        torch.tensor(subjects)[order],
        torch.tensor(profile)[order],
    )


def by_hand(
    x: np.ndarray, subjects: np.ndarray, profile: np.ndarray, shrinkage: float
) -> tuple[np.ndarray, np.ndarray]:
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    each = []
    for subject in np.unique(subjects):
        front, side = unit[(subjects == subject) & ~profile], unit[(subjects == subject) & profile]
        if len(front) and len(side):
            across = front.mean(0) - side.mean(0)
            each.append((np.cov(front.T, bias=True) + np.cov(side.T, bias=True) + np.outer(across, across)) / 2)
    within = np.mean(each, axis=0)
    values, vectors = np.linalg.eigh(within / (np.trace(within) / x.shape[1]) + shrinkage * np.eye(x.shape[1]))
    return vectors @ np.diag(values**-0.5) @ vectors.T, (unit[profile].mean(0) + unit[~profile].mean(0)) / 2


@pytest.mark.parametrize("shrinkage", [0.1, 3.0])
def test_map_is_the_inverse_root_of_what_varies_within_a_subject(shrinkage):
    x, subjects, profile = rows()
    weight, centre = within_class_map(x, subjects, profile, shrinkage)
    wanted, middle = by_hand(x.numpy(), subjects.numpy(), profile.numpy(), shrinkage)
    np.testing.assert_allclose(weight.numpy(), wanted, atol=1e-8)
    np.testing.assert_allclose(centre.numpy(), middle, atol=1e-8)


def test_without_profile_rows_views_are_not_distinguished():
    x, subjects, profile = rows(paired=20)
    unlabelled = torch.zeros_like(profile)
    weight, centre = within_class_map(x, subjects, unlabelled, 1.0)
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    within = torch.stack([torch.cov(unit[subjects == one].T, correction=0) for one in range(25)]).mean(dim=0)
    wanted = torch.linalg.inv(within / (within.trace() / DIM) + torch.eye(DIM))
    torch.testing.assert_close(weight @ weight, wanted, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(centre, unit.mean(dim=0))


def test_one_row_a_subject_gives_the_identity():
    weight, _ = within_class_map(torch.randn(6, DIM), torch.arange(6), torch.zeros(6, dtype=torch.bool), 3.0)
    assert torch.equal(weight, torch.eye(DIM, dtype=torch.float64))


def test_equal_rows_of_a_subject_give_the_identity():
    x = torch.randn(3, DIM).repeat_interleave(2, dim=0)
    weight, _ = within_class_map(x, torch.tensor([0, 0, 1, 1, 2, 2]), torch.zeros(6, dtype=torch.bool), 3.0)
    assert torch.equal(weight, torch.eye(DIM, dtype=torch.float64))


def test_mixture_is_the_formula_and_a_row_keeps_its_scale():
    x, subjects, profile = rows()
    whitening = Whitening(DIM, strength=0.5)
    whitening.solve(x, subjects, profile, 3.0)
    front = torch.randn(len(x), DIM)
    weight, centre = within_class_map(x, subjects, profile, 3.0)
    y = (x.double() / x.double().norm(dim=1, keepdim=True) - centre) @ weight
    wanted = front + 0.5 * front.norm(dim=1, keepdim=True) * (y / y.norm(dim=1, keepdim=True)).float()
    mixed = whitening(front, x)
    torch.testing.assert_close(mixed, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whitening(7 * front, 7 * x), 7 * mixed, atol=1e-4, rtol=1e-5)


def test_it_is_mixed_into_front_and_into_no_branch(trained):
    model = trained(48, False, architecture="dual_branch_ensemble", members=2, whitening=0.5)
    x = torch.randn(9, 48)
    with torch.no_grad():
        mixed, identity, pose = model(x, return_branches=True)
        whitening, model.whitening = model.whitening, None
        alone = model(x, return_branches=True)
        model.whitening = whitening
    assert torch.equal(mixed, whitening(alone[0], x))
    assert not torch.allclose(mixed, alone[0], atol=0.1)
    assert torch.equal(identity, alone[1])
    assert torch.equal(pose, alone[2])


def test_unsolved_it_has_no_effect():
    x = torch.randn(7, 64) * 30
    for output in DualBranchEnsemble(feature_dim=64, whitening=0.5).eval()(x, return_branches=True):
        assert torch.equal(output, x)
