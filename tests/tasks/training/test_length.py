"""How long the change of a network is to be: chosen on subjects it has not seen, shorter where few can vouch for it."""

import numpy as np
import pytest
import torch

from models.dual_branch import DualBranchEnsemble
from models.se import SEBlock
from tasks.training.length import FEWEST, SHARES, Unseen, at_length, choose_length, folds_of, lengths_of
from tasks.training.rows import TrainingRows

DIM = 12


def rows(subjects: int, side: float, seed: int = 0) -> TrainingRows:
    """Subjects in three frontal rows and three profile rows, all of which are moved along the first channel."""
    random = np.random.default_rng(seed)
    x = np.repeat(random.normal(size=(subjects, DIM)), 6, axis=0) + 0.4 * random.normal(size=(6 * subjects, DIM))
    profile = np.tile([False, False, False, True, True, True], subjects)
    x[profile, 0] += side
    names = np.array([f"person {seed}-{row // 6}" for row in range(len(x))], object)
    return TrainingRows(x.astype(np.float32), names, np.where(profile, 2, 0), "")


def moving(sign: float) -> DualBranchEnsemble:
    """Return a network that takes 4 from the first channel of profile rows (sign 1), or adds them."""
    torch.manual_seed(0)
    model = DualBranchEnsemble(members=1, feature_dim=DIM, reduction=4, hidden_dim=4)
    with torch.no_grad():
        for branch in (model.members[0].identity_branch, model.members[0].pose_branch):
            branch.expand.weight.zero_()
            branch.expand.weight[0, 0] = 1.0
            branch.project.weight[0, 0] = -2.0 * sign
    return model.eval()


def unseen(model: torch.nn.Module, subjects: int, parts: int = 1) -> list[Unseen]:
    return [Unseen(model, rows(subjects, 4.0, seed), DIM**0.5) for seed in range(parts)]


def test_change_that_helps_is_taken_and_claimed_on_enough_subjects_only():
    many = choose_length(unseen(moving(1.0), 20, parts=2), seed=0)
    assert (many.best.share, many.cell, many.subjects, many.improved) == (1.0, "frontal-profile", 40, True)
    assert many.best.eer.high < 0 < many.best.error
    few = choose_length(unseen(moving(1.0), FEWEST - 1), seed=0)
    assert (few.best.share, few.improved) == (1.0, False)
    assert few.best.error > many.best.error


def test_change_that_harms_is_cut_to_nothing():
    choice = choose_length(unseen(moving(-1.0), 20), seed=0)
    assert (choice.best.share, choice.best.score, choice.improved) == (None, 0.0, False)
    scores = [one.score for one in choice.scored]
    assert scores == sorted(scores, reverse=True), "the longer, the worse"
    assert [one.share for one in choice.scored] == [1.0, 0.75, 0.5, 0.25, None]


def test_what_can_be_cut_and_what_raw_is():
    x = torch.randn(5, DIM)
    mixed = DualBranchEnsemble(members=1, feature_dim=DIM, reduction=4, whitening=0.5).eval()
    mixed.whitening.weight.copy_(torch.randn(DIM, DIM))
    with torch.no_grad():
        mixed.members[0].pose_branch.project.bias += 1
    assert lengths_of(mixed) == SHARES
    assert lengths_of(moving(1.0)) == SHARES[:-1]
    assert lengths_of(SEBlock(DIM, 4)) == (1.0,)
    for model in (mixed, moving(1.0), SEBlock(DIM, 4)):
        with torch.no_grad():
            cosine = torch.nn.functional.cosine_similarity(at_length(model.eval(), None)(x), x)
        torch.testing.assert_close(cosine, torch.ones(5))
    assert float(mixed.whitening.weight.abs().sum()) > 0, "the model itself is left as it is"


@pytest.mark.parametrize(("subjects", "folds"), [(3, 0), (5, 2), (20, 3)])
def test_folds_share_nobody_and_each_has_pairs(subjects, folds):
    one = rows(subjects, 0.0)
    frontal = TrainingRows(one.x, np.array([f"frontal {name}" for name in one.subjects], object), one.classes * 0, "")
    both = TrainingRows(
        np.concatenate([one.x, frontal.x]),
        np.concatenate([one.subjects, frontal.subjects]),
        np.concatenate([one.classes, frontal.classes]),
        "",
    )
    found = folds_of(both, 3)
    assert len(found) == folds
    if found:
        assert sorted(np.concatenate(found)) == sorted(np.unique(both.subjects))
        assert min(np.isin(fold, one.subjects).sum() for fold in found) >= 2
