"""The training loop on people made of numbers: what is in a batch, what is learnt, chosen, and repeatable."""

import itertools

import pytest
import torch

from models.dual_branch import DualBranchEnsemble, DualBranchSENet
from models.se import SEBlock
from models.training import LabelledTensor, Recipe, draw_batches, fit
from models.whitening import within_class_map

DIM = 24


def people(subjects: int = 40, other: int = 5, profile: int = 3, seed: int = 0) -> LabelledTensor:
    """Subjects whose profile rows are moved by one shift that all share: something to be learnt."""
    random = torch.Generator().manual_seed(seed)
    shift = 2 * torch.randn(DIM, generator=torch.Generator().manual_seed(99))
    centres = torch.randn(subjects, DIM, generator=random)
    codes = torch.arange(subjects).repeat_interleave(other + profile)
    side = torch.tensor([False] * other + [True] * profile).repeat(subjects)
    noise = 0.4 * torch.randn(len(codes), DIM, generator=random)
    return LabelledTensor(centres[codes] + side[:, None] * shift + noise, codes, side)


def misses(rows: LabelledTensor):
    """A score: the share of impostor pairs above the median of the genuine ones, on rows that training never sees."""

    def score(model: torch.nn.Module) -> float:
        with torch.no_grad():
            unit = torch.nn.functional.normalize(model(rows.x))
        first, second = torch.triu_indices(len(unit), len(unit), 1)
        cosines, genuine = (unit @ unit.T)[first, second], rows.subjects[first] == rows.subjects[second]
        return float((cosines[~genuine] >= cosines[genuine].median()).float().mean())

    return score


def tiny(**arguments: object) -> DualBranchEnsemble:
    torch.manual_seed(5)
    return DualBranchEnsemble(**{"members": 2, "hidden_dim": 16, "feature_dim": DIM, "reduction": 4, **arguments})


QUICK = Recipe(validate_every=20, shares=(1.0, 0.8, 0.6))


def batches(rows: LabelledTensor, recipe: Recipe, count: int = 12, seed: int = 0) -> list[torch.Tensor]:
    return list(itertools.islice(draw_batches(rows, recipe, torch.Generator().manual_seed(seed)), count))


def test_batch_holds_as_many_rows_of_both_views_and_the_others_share():
    paired = people(subjects=20)
    others = torch.full((30,), 20) + torch.arange(30) // 3  # ten subjects of three rows, without a profile row
    rows = LabelledTensor(
        torch.cat([paired.x, torch.randn(30, DIM)]),
        torch.cat([paired.subjects, others]),
        torch.cat([paired.profile, torch.zeros(30, dtype=torch.bool)]),
    )
    recipe = Recipe(paired_subjects=8, rows_per_view=2, other_subjects=5, rows_per_other=2)
    for batch in batches(rows, recipe):
        assert len(set(batch.tolist())) == len(batch) == 8 * 4 + 5 * 2
        per_subject = rows.subjects[batch].bincount(minlength=30)
        assert per_subject[:20].sum() == 32
        assert set(per_subject.tolist()) == {0, 2, 4}
        assert rows.profile[batch].sum() == 16


def test_without_profile_rows_a_batch_takes_its_rows_from_any_subject():
    rows = people(subjects=20, profile=0, other=9)
    recipe = Recipe(paired_subjects=8, rows_per_view=3, other_subjects=4)
    for batch in batches(rows, recipe):
        assert sorted(set(rows.subjects[batch].bincount(minlength=20).tolist())) == [0, 6]
        assert len(batch) == 12 * 6


def test_subject_seen_from_the_side_only_is_one_of_the_others():
    rows = people(subjects=6, other=2, profile=2)
    keep = rows.profile | (rows.subjects < 3)
    rows = LabelledTensor(rows.x[keep], rows.subjects[keep], rows.profile[keep])
    seen = torch.cat(batches(rows, Recipe(paired_subjects=3, other_subjects=3)))
    assert set(rows.subjects[seen].tolist()) == set(range(6))


def test_few_subjects_and_few_rows_are_all_taken_and_never_twice():
    rows = people(subjects=3, other=1, profile=2)
    for batch in batches(rows, Recipe()):
        assert sorted(batch.tolist()) == list(range(9))


def test_every_subject_comes_before_any_comes_again():
    rows = people(subjects=20)
    recipe = Recipe(paired_subjects=5, other_subjects=0)
    for offset in (0, 4, 8):
        seen = torch.cat([rows.subjects[batch].unique() for batch in batches(rows, recipe)[offset : offset + 4]])
        assert sorted(seen.tolist()) == list(range(20))


def test_subject_with_very_many_rows_gives_as_many_as_any():
    rows = people(subjects=2, other=5000, profile=4)
    for batch in batches(rows, Recipe(paired_subjects=2, rows_per_view=3)):
        assert 10 <= len(batch) == len(set(batch.tolist())) <= 12


@pytest.mark.parametrize("use_batch_stat", [False, True])
def test_training_helps_held_out_subjects(use_batch_stat):
    held_out = misses(people(seed=1))
    fitted = fit(tiny(use_batch_stat=use_batch_stat), people(), held_out, steps=60, seed=0, recipe=QUICK)
    assert [(one.step, one.share) for one in fitted.candidates[:4]] == [(0, 1.0), (20, 1.0), (20, 0.8), (20, 0.6)]
    assert fitted.best.score < 0.7 * fitted.candidates[0].score
    assert held_out(fitted.model) == pytest.approx(fitted.best.score, abs=1e-6)
    assert misses(people(seed=2))(fitted.model) < 0.8 * misses(people(seed=2))(tiny().eval())
    assert not fitted.model.training


@pytest.mark.parametrize("loss", ["global_threshold", "supcon", "triplet"])
def test_equal_seeds_give_equal_bits_whatever_the_threads_and_another_seed_does_not(loss):
    def weights(seed: int, threads: int) -> dict[str, torch.Tensor]:
        torch.set_num_threads(threads)
        try:
            return fit(
                tiny(), people(), lambda _: 0.0, steps=4, seed=seed, loss=loss, recipe=last(4)
            ).model.state_dict()
        finally:
            torch.set_num_threads(1)

    def last(steps: int) -> Recipe:
        return Recipe(validate_every=steps)

    first, again, other = weights(0, 1), weights(0, 2), weights(1, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    # The score is the same for all, so step 0 is kept: compare what was trained instead.
    scores = iter([1.0, *([0.0] * 99)])
    moved = fit(tiny(), people(), lambda _: next(scores), steps=4, seed=0, loss=loss, recipe=last(4)).model.state_dict()
    assert not all(torch.equal(moved[name], other[name]) for name in moved)


def test_members_are_trained_apart_and_end_apart():
    scores = iter([1.0, 0.0, 0.5, 0.5])
    fitted = fit(tiny(), people(), lambda _: next(scores), steps=5, seed=0, recipe=QUICK)
    first, second = (member.identity_branch.project.weight for member in fitted.model.members)
    assert first.abs().sum() > 0
    assert not torch.allclose(first, second, atol=1e-4)


def test_network_that_nothing_beats_is_returned_as_it_was():
    worse = itertools.count()
    model = DualBranchSENet(DIM, reduction=4)
    x = people().x
    fitted = fit(model, people(), lambda _: float(next(worse)), steps=10, seed=0, recipe=QUICK)
    assert fitted.best.step == 0
    assert torch.equal(fitted.model(x), x)


def test_share_that_scores_best_is_the_one_returned():
    scores, seen = iter([1.0, 0.5, 0.2, 0.4]), []

    def score(model: torch.nn.Module) -> float:
        seen.append(projection(model))
        return next(scores)

    def projection(model: torch.nn.Module) -> float:
        return float(model.members[0].pose_branch.project.weight.detach().norm())

    fitted = fit(tiny(), people(), score, steps=10, seed=0, recipe=Recipe(validate_every=10, shares=(1.0, 0.5, 0.1)))
    assert (fitted.best.step, fitted.best.share) == (10, 0.5)
    assert seen[2] == pytest.approx(seen[1] / 2, rel=1e-5)
    assert projection(fitted.model) == pytest.approx(seen[2], rel=1e-6)


def test_stopping_keeps_the_best_so_far():
    reports = []
    fitted = fit(
        tiny(), people(), misses(people(seed=1)), steps=10_000, seed=0, recipe=QUICK,
        report=lambda step, loss, best: reports.append((step, best.step, loss > 0)),
        should_stop=lambda: len(reports) == 2,
    )  # fmt: skip
    assert fitted.interrupted
    assert reports == [(20, 20, True), (40, 40, True)]
    assert fitted.best.step in (20, 40)
    assert fitted.best.score == min(one.score for one in fitted.candidates)


def test_stopping_before_anything_competed_lets_the_network_of_that_moment_compete():
    reports: list[tuple[int, float]] = []
    fitted = fit(
        tiny(), people(), misses(people(seed=1)), steps=360, seed=0,
        report=lambda step, _loss, best: reports.append((step, best.score)),
        should_stop=lambda: len(reports) == 2,
    )  # fmt: skip
    assert [step for step, _ in reports] == [40, 80]  # the recipe is the default one
    assert (fitted.interrupted, fitted.best.step) == (True, 80)
    assert fitted.best.score == pytest.approx(reports[-1][1])
    assert [one.step for one in fitted.candidates] == [0, 80]


def test_stopping_before_the_first_step_gives_the_network_back_as_it_was():
    calls = itertools.count()

    def score(_model: torch.nn.Module) -> float:
        assert next(calls) == 0, "nothing has been trained that could be scored"
        return 0.0

    fitted = fit(tiny(), people(), score, steps=360, seed=0, should_stop=lambda: True)
    assert (fitted.interrupted, fitted.best.step) == (True, 0)
    assert torch.equal(fitted.model(people().x), people().x)


def test_reports_between_the_candidates_do_not_compete():
    reports: list[tuple[int, int]] = []
    recipe = Recipe(validate_every=8, report_every=3)
    fitted = fit(
        tiny(), people(), misses(people(seed=1)), steps=10, seed=0, recipe=recipe,
        report=lambda step, _loss, best: reports.append((step, best.step)),
    )  # fmt: skip
    assert reports == [(3, 3), (6, 6), (8, 8), (9, 9), (10, 10)]
    assert [one.step for one in fitted.candidates] == [0, 8, 10]


def test_whitening_is_solved_for_and_the_change_made_longer_but_raw_is_left_alone():
    rows = people()
    seen: list[tuple[float, float]] = []

    def score(model: torch.nn.Module) -> float:
        learnt = model.members[0].pose_branch.project.weight.detach()
        seen.append((float(model.whitening.weight.norm()), float(learnt.norm())))
        return -float(len(seen))

    recipe = Recipe(validate_every=5, shrinkage=2.0, lengthening=1.5)
    fitted = fit(tiny(whitening=0.5), rows, score, steps=5, seed=0, recipe=recipe)
    assert seen[0] == (0, 0)
    wanted, _ = within_class_map(rows.x, rows.subjects, rows.profile, 2.0)
    torch.testing.assert_close(fitted.model.whitening.weight, wanted.float())
    falling = itertools.count()
    plain = fit(tiny(), rows, lambda _: -float(next(falling)), steps=5, seed=0, recipe=recipe).model
    longer, learnt = fitted.model.members[0].pose_branch.project.weight, plain.members[0].pose_branch.project.weight
    torch.testing.assert_close(longer, 1.5 * learnt)


def test_frozen_statistic_is_the_mean_over_the_training_rows():
    rows = people()
    fitted = fit(SEBlock(DIM, 4, use_batch_stat=True), rows, lambda _: 0.0, steps=3, seed=0, recipe=QUICK)
    torch.testing.assert_close(fitted.model.frozen_mean, rows.x.mean(0), atol=1e-5, rtol=1e-5)
    assert int(fitted.model.frozen_rows) == len(rows.x)


def test_threads_are_left_as_they_were():
    torch.set_num_threads(2)
    try:
        fit(tiny(), people(), lambda _: 0.0, steps=2, seed=0, recipe=QUICK)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_learns_as_well():
    held_out = misses(people(seed=1))
    fitted = fit(tiny(), people(), held_out, steps=60, seed=0, recipe=QUICK, device="cuda")
    assert fitted.best.score < 0.7 * fitted.candidates[0].score
    assert next(fitted.model.parameters()).device.type == "cpu"
