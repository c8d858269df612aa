import pytest

from models.architectures import ARCHITECTURES, build, check_arguments, mode_of
from models.dual_branch import DualBranchSENet
from models.se import SEBlock
from schemas.errors import SettingsError


def test_build_passes_every_argument_on():
    model = build(
        "dual_branch",
        {
            "feature_dim": 48,
            "reduction": 4,
            "fusion_alpha": 0.25,
            "learnable_fusion": False,
            "use_batch_stat": True,
            "hidden_dim": 10,
            "dropout": 0.1,
        },
    )
    assert isinstance(model, DualBranchSENet)
    assert model.pose_branch.expand.weight.shape == (10, 48)
    assert model.pose_branch.se.fc[0].weight.shape == (12, 48)
    assert model.pose_branch.se.use_batch_stat
    assert model.pose_branch.dropout.p == 0.1
    assert model.alpha.item() == 0.25
    assert not model.fusion_logit.requires_grad

    block = build("se", {"channels": 48, "reduction": 8, "use_batch_stat": True})
    assert isinstance(block, SEBlock)
    assert block.fc[0].weight.shape == (6, 48)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_mode_and_dimension_are_read_from_the_arguments(name):
    key = "channels" if name == "se" else "feature_dim"
    arguments = check_arguments(name, {key: 40, "use_batch_stat": True})
    assert (arguments.dim, mode_of(arguments)) == (40, "batch_stat")
    assert mode_of(check_arguments(name, {key: 40})) == "per_sample"


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("resnet", {}, "'resnet' is unknown; known are dual_branch, dual_branch_ensemble, se"),
        ("se", {}, "channels"),
        ("se", {"channels": 10**9}, "channels = 1000000000"),
        ("se", {"channels": "512"}, "channels = '512'"),
        ("se", {"channels": 8, "reduction": 16}, "8 channels with reduction 16"),
        ("dual_branch", {"feature_dim": -1}, "feature_dim = -1"),
        ("dual_branch", {"fusion_alpha": 1.0}, "fusion_alpha = 1.0"),
        ("dual_branch", {"dropout": float("nan")}, "dropout = nan"),
        ("dual_branch", {"colour": "red"}, "colour = 'red'"),
    ],
)
def test_unusable_arguments_are_named(name, arguments, named):
    with pytest.raises(SettingsError, match=named):
        build(name, arguments)
