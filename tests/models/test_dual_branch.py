import numpy as np
import pytest
import torch

from models.dual_branch import DualBranchEnsemble, DualBranchSENet, members_of, scale_change
from schemas.errors import SettingsError


def test_published_use_gives_three_branches():
    model = DualBranchSENet(feature_dim=512, reduction=16, fusion_alpha=0.7)
    front, identity, pose = model(torch.randn(4, 512), return_branches=True)
    assert front.shape == identity.shape == pose.shape == (4, 512)


@pytest.mark.parametrize("use_batch_stat", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_untrained_network_gives_back_its_input_exactly(use_batch_stat, training):
    torch.manual_seed(0)
    model = DualBranchSENet(192, use_batch_stat=use_batch_stat).train(training)
    x = torch.randn(33, 192) * 30
    for output in model(x, return_branches=True):
        assert torch.equal(output, x)


@pytest.mark.parametrize("alpha", [0.7, 0.5, 0.25, 0.9, 0.3])
def test_alpha_is_exact_in_float32_at_the_start(alpha):
    model = DualBranchSENet(32, fusion_alpha=alpha)
    assert np.float32(model.alpha.item()) == np.float32(alpha)


def test_alpha_close_to_its_limits_is_as_near_as_a_float32_logit_allows():
    for alpha in (1e-4, 0.9999):
        assert DualBranchSENet(32, fusion_alpha=alpha).alpha.item() == pytest.approx(alpha, rel=1e-6)


def test_front_is_the_alpha_mixture_of_the_branches(trained):
    model = trained(64, False)
    front, identity, pose = model(torch.randn(20, 64), return_branches=True)
    assert not torch.allclose(identity, pose, atol=0.1)
    alpha = model.alpha.item()
    assert alpha != pytest.approx(0.7, abs=1e-3)
    torch.testing.assert_close(front, alpha * identity + (1 - alpha) * pose, atol=1e-5, rtol=1e-5)


def test_learnable_alpha_moves_and_fixed_alpha_stays(trained):
    assert trained(64, False).alpha.item() != pytest.approx(0.7, abs=1e-3)
    fixed = trained(64, False, learnable_fusion=False)
    assert np.float32(fixed.alpha.item()) == np.float32(0.7)
    assert "fusion_logit" not in dict(fixed.named_parameters())
    assert "fusion_logit" in fixed.state_dict()


def test_every_parameter_gets_a_gradient_once_the_last_layers_have_left_zero(trained):
    model = trained(64, False).train()
    model(torch.randn(16, 64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_row_does_not_depend_on_other_rows_in_eval(trained):
    x = torch.randn(40, 64)
    for use_batch_stat in (False, True):  # frozen, in the second case
        model = trained(64, use_batch_stat)
        torch.testing.assert_close(model(x[3:4])[0], model(x)[3], atol=2e-6, rtol=1e-6)
    model.identity_branch.se.statistic = model.pose_branch.se.statistic = "batch"
    assert not torch.allclose(model(x[3:4])[0], model(x)[3], atol=1e-3)


def test_hidden_dim_is_the_width_inside_a_branch():
    model = DualBranchSENet(64, hidden_dim=10)
    assert model.pose_branch.expand.weight.shape == (10, 64)
    assert model(torch.randn(3, 64)).shape == (3, 64)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"fusion_alpha": 0.0}, "fusion_alpha is 0.0"),
        ({"fusion_alpha": 1.0}, "fusion_alpha is 1.0"),
        ({"fusion_alpha": float("nan")}, "fusion_alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"feature_dim": 8, "reduction": 16}, "8 channels with reduction 16"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, named):
    with pytest.raises(SettingsError, match=named):
        DualBranchSENet(**arguments)


def test_ensemble_is_the_mean_of_its_members_in_every_output(trained):
    model = trained(48, False, architecture="dual_branch_ensemble", members=3)
    x = torch.randn(9, 48)
    with torch.no_grad():
        apart = [member(x, return_branches=True) for member in members_of(model)]
        together = model(x, return_branches=True)
        for ours, parts in zip(together, zip(*apart, strict=True), strict=True):
            assert not torch.allclose(parts[0], parts[1], atol=1e-2)
            torch.testing.assert_close(ours, sum(parts) / 3, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(x), together[0])


def test_untrained_ensemble_gives_back_its_input_exactly():
    x = torch.randn(7, 64) * 30
    for output in DualBranchEnsemble(feature_dim=64).eval()(x, return_branches=True):
        assert torch.equal(output, x)


def test_ensemble_without_members_is_refused():
    with pytest.raises(SettingsError, match="members is 0"):
        DualBranchEnsemble(members=0, feature_dim=64)


def test_negative_whitening_is_refused():
    with pytest.raises(SettingsError, match="whitening is -1"):
        DualBranchEnsemble(whitening=-1, feature_dim=64)


def test_members_of_a_single_network_is_itself():
    model = DualBranchSENet(64)
    assert members_of(model) == [model]


@pytest.mark.parametrize("architecture", ["dual_branch", "dual_branch_ensemble"])
def test_scaled_change_goes_that_share_of_the_way_from_x(trained, architecture):
    model, x = trained(48, True, architecture=architecture), torch.randn(9, 48)
    with torch.no_grad():
        before = model(x, return_branches=True)
        scale_change(model, 0.25)
        for ours, full in zip(model(x, return_branches=True), before, strict=True):
            torch.testing.assert_close(ours, x + 0.25 * (full - x), atol=1e-5, rtol=1e-5)
