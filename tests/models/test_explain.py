import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from models.explain import (
    agreement,
    identity_relatedness,
    member_weights,
    rank_correlation,
    summarise,
    top_channels,
)


def test_weights_are_those_of_each_branch(trained):
    x = torch.randn(6, 64)
    model = trained(64, False).train()
    weights = member_weights(model, x)
    assert model.training
    assert list(weights) == ["identity", "pose"]
    for name, branch in (("identity", model.identity_branch), ("pose", model.pose_branch)):
        assert weights[name].shape == (1, 6, 64)
        np.testing.assert_array_equal(weights[name][0], branch.se.fc(x).detach().numpy())

    block = trained(64, False, architecture="se")
    np.testing.assert_array_equal(member_weights(block, x)["se"][0], block.fc(x).detach().numpy())


def test_weights_of_a_batch_statistic_are_the_frozen_ones_for_every_row(trained):
    model = trained(64, True)
    weights = member_weights(model.train(), torch.randn(6, 64))["pose"]
    frozen = model.pose_branch.se.fc(model.pose_branch.se.frozen_mean).detach().numpy()
    np.testing.assert_allclose(weights, np.tile(frozen, (1, 6, 1)), atol=1e-7)


def test_weights_of_an_ensemble_are_those_of_its_members(trained):
    x, model = torch.randn(6, 64), trained(64, False, architecture="dual_branch_ensemble", members=2)
    members = member_weights(model, x)
    assert list(members) == ["identity", "pose"]
    apart = [member_weights(member, x)["pose"][0] for member in model.members]
    assert np.abs(apart[0] - apart[1]).max() > 0.01
    np.testing.assert_array_equal(members["pose"], np.stack(apart))
    expected = spearmanr(apart[0].mean(axis=0), apart[1].mean(axis=0)).statistic
    assert agreement(members["pose"]) == pytest.approx(expected)


def test_agreement_is_the_mean_over_pairs_of_members():
    first = np.array([[0.1, 0.2, 0.3, 0.4]])
    assert agreement(np.stack([first, first, first + 0.5])) == pytest.approx(1)
    assert agreement(np.stack([first, -first, first])) == pytest.approx(-1 / 3)
    assert agreement(first[None]) is None
    assert agreement(np.stack([first, np.ones((1, 4))])) is None


def test_unknown_network_has_no_channel_weights():
    with pytest.raises(TypeError, match="Linear"):
        member_weights(nn.Linear(2, 2), torch.zeros(1, 2))


def test_summary_and_top_channels_by_hand():
    weights = np.array([[0.1, 0.5, 0.5, 0.9], [0.3, 0.5, 0.5, 0.7]])
    summary = summarise(weights)
    np.testing.assert_allclose(summary.mean, [0.2, 0.5, 0.5, 0.8])
    np.testing.assert_allclose(summary.spread, [0.1, 0, 0, 0.1], atol=1e-15)
    assert top_channels(weights[0], 3) == [(3, 0.9), (1, 0.5), (2, 0.5)]
    assert [channel for channel, _ in top_channels(weights[0], 100)] == [3, 1, 2, 0]
    with pytest.raises(ValueError, match="n > 0"):
        summarise(np.empty((0, 4)))


def test_identity_relatedness_by_hand():
    # Channel 0: view means a: 1, 3; b: 5, 7. Centres 2 and 6, between = 8; within = 2 and 2.
    # Channel 1 varies only between subjects, channel 2 only across views, channel 3 not at all.
    x = np.array(
        [
            [0, 4, 0, 9],
            [2, 4, 0, 9],
            [3, 4, 1, 9],
            [5, 8, 0, 9],
            [7, 8, 1, 9],
            [99, 99, 99, 99],
        ],
        dtype=np.float32,
    )
    subjects = ["a", "a", "a", "b", "b", "seen from one side only"]
    views = ["frontal", "frontal", "profile", "frontal", "profile", "frontal"]
    np.testing.assert_allclose(identity_relatedness(x, subjects, views), [4, np.inf, 0, np.nan])


def test_identity_relatedness_is_the_anova_f_ratio_over_balanced_views():
    from scipy.stats import f_oneway

    generator = np.random.default_rng(0)
    subjects, views = np.repeat(np.arange(30), 3), np.tile(np.arange(3), 30)
    x = generator.normal(size=(90, 5)) + generator.normal(size=(30, 5))[subjects] * [0, 1, 2, 3, 4]
    f = f_oneway(*(x[subjects == s] for s in range(30))).statistic
    np.testing.assert_allclose(3 * identity_relatedness(x, subjects.tolist(), views.tolist()), f, rtol=1e-12)


def test_identity_relatedness_wants_two_subjects_in_two_views():
    x = np.zeros((3, 2))
    with pytest.raises(ValueError, match="1 subjects were seen in two views"):
        identity_relatedness(x, ["a", "a", "b"], ["frontal", "profile", "frontal"])
    with pytest.raises(ValueError, match="3 rows, 2 subjects"):
        identity_relatedness(x, ["a", "a"], ["frontal", "profile", "frontal"])


def test_rank_correlation_at_its_limits():
    a = np.array([1.0, 2.0, 3.0, np.inf])
    assert rank_correlation(a, np.exp(a)) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(np.array([1, 2, np.nan, 3.0]), np.array([1, 2, -5.0, 3])) == pytest.approx(1)
    assert rank_correlation(np.array([1, 1, 2, 3.0]), np.array([1, 2, 3, 3.0])) == pytest.approx(8 / 9)  # ties
    assert rank_correlation(a, np.ones(4)) is None
    assert rank_correlation(np.array([]), np.array([])) is None
    with pytest.raises(ValueError, match="one length"):
        rank_correlation(a, a[:2])
