import matplotlib
import numpy as np
import pytest
import torch

from models.dual_branch import DualBranchSENet
from models.explain import top_channels
from models.se import SEBlock, gather_statistics
from schemas.errors import SettingsError, TrainingError

matplotlib.use("Agg")


def test_published_use_keeps_the_shape_and_gives_weights_between_0_and_1():
    se = SEBlock(channels=512, reduction=16, use_batch_stat=False)
    x = torch.randn(4, 512)
    assert se(x).shape == x.shape
    weights = se.fc(x)
    assert weights.shape == (4, 512)
    assert (weights > 0).all()
    assert (weights < 1).all()


def test_published_use_plots_one_sample_and_lists_its_ten_most_important_channels(tmp_path):
    from matplotlib import pyplot as plt

    se = SEBlock(channels=512, reduction=16, use_batch_stat=False)
    x = torch.randn(4, 512)
    with torch.no_grad():
        weights = se.fc(x)[0].numpy()
    figure, axes = plt.subplots()
    axes.plot(range(512), weights)
    axes.set_xlabel("channel")
    axes.set_ylabel("weight")
    figure.savefig(tmp_path / "weights.png")
    plt.close(figure)
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")

    listed = top_channels(weights, 10)
    values, channels = torch.from_numpy(weights).topk(10)
    assert [channel for channel, _ in listed] == channels.tolist()
    assert [weight for _, weight in listed] == values.tolist()


def test_output_follows_the_formula_written_out_in_numpy():
    torch.manual_seed(0)
    se = SEBlock(channels=32, reduction=4)
    x = torch.randn(5, 32)
    first, second = (se.fc[i].weight.detach().numpy().astype(np.float64) for i in (0, 2))
    assert first.shape == (8, 32)
    rows = x.numpy().astype(np.float64)
    expected = rows / (1 + np.exp(-(np.maximum(rows @ first.T, 0) @ second.T)))
    np.testing.assert_allclose(se(x).detach().numpy(), expected, atol=1e-6)
    assert sum(parameter.numel() for parameter in se.parameters()) == 2 * 8 * 32  # no biases


def test_per_sample_row_does_not_depend_on_other_rows():
    torch.manual_seed(0)
    se = SEBlock(channels=64, reduction=8)
    x = torch.randn(50, 64)
    together = se(x)
    for row in (0, 17, 49):
        torch.testing.assert_close(se(x[row : row + 1])[0], together[row], atol=1e-6, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_batch_statistic_gives_all_rows_one_weight_vector(training):
    torch.manual_seed(0)
    se = SEBlock(channels=64, reduction=8, use_batch_stat=True).train(training)
    x = torch.randn(10, 64)
    weights = se.weights(x)
    assert weights.shape == (1, 64)
    torch.testing.assert_close(weights, se.fc(x.mean(dim=0, keepdim=True)))
    torch.testing.assert_close(se(x) / x, weights.expand(10, 64))


def test_frozen_statistic_is_the_mean_over_all_rows_however_they_were_cut():
    torch.manual_seed(0)
    rows = torch.randn(1000, 32) * 50 + 1000
    frozen = []
    for size in (1000, 7):
        se = SEBlock(channels=32, reduction=4, use_batch_stat=True)
        assert not se.gathered
        assert gather_statistics(se, rows.split(size)) == 1000
        assert se.gathered
        frozen.append(se.frozen_mean)
    assert torch.equal(*frozen)
    np.testing.assert_allclose(frozen[0].numpy(), rows.numpy().mean(axis=0, dtype=np.float64), rtol=1e-7)


def test_frozen_statistic_makes_a_row_independent_of_its_batch_only_in_eval():
    torch.manual_seed(0)
    se = SEBlock(channels=64, reduction=8, use_batch_stat=True)
    x = torch.randn(40, 64)
    gather_statistics(se, [torch.randn(100, 64) + 1])
    assert se.training  # gathering keeps the mode

    assert not torch.allclose(se(x)[:3], se(x[:3]))
    se.eval()
    torch.testing.assert_close(se(x)[:3], se(x[:3]), atol=1e-6, rtol=0)
    se.statistic = "batch"
    torch.testing.assert_close(se.weights(x), se.fc(x.mean(dim=0, keepdim=True)))


def test_gathering_again_replaces_the_earlier_statistic():
    se = SEBlock(channels=8, reduction=2, use_batch_stat=True)
    gather_statistics(se, [torch.full((3, 8), 5.0)])
    gather_statistics(se, [torch.full((2, 8), 1.0), torch.full((2, 8), 3.0)])
    assert torch.equal(se.frozen_mean, torch.full((8,), 2.0))
    assert int(se.frozen_rows) == 4


def test_gathering_reaches_both_branches_and_leaves_batch_norm_alone():
    model = DualBranchSENet(64, use_batch_stat=True)
    before = model.pose_branch.norm.running_mean.clone()
    rows = torch.randn(30, 64)
    gather_statistics(model, [rows])
    for branch in (model.identity_branch, model.pose_branch):
        torch.testing.assert_close(branch.se.frozen_mean, rows.mean(dim=0))
    assert torch.equal(model.pose_branch.norm.running_mean, before)


def test_gathering_from_nothing_is_refused_and_per_sample_models_have_nothing_to_gather():
    with pytest.raises(TrainingError, match="no row"):
        gather_statistics(SEBlock(32, use_batch_stat=True), [])
    assert gather_statistics(SEBlock(32), [torch.zeros(3, 32)]) == 0
    assert not SEBlock(32).gathered


def test_reduction_that_leaves_no_hidden_unit_is_refused():
    with pytest.raises(SettingsError, match="16 channels with reduction 17"):
        SEBlock(channels=16, reduction=17)
    with pytest.raises(SettingsError, match="reduction 0"):
        SEBlock(channels=16, reduction=0)
    assert SEBlock(channels=16, reduction=16)(torch.ones(2, 16)).shape == (2, 16)


@pytest.mark.parametrize("shape", [(512,), (2, 256), (2, 512, 1)])
def test_wrong_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"wants \[batch, 512\]"):
        SEBlock(512)(torch.zeros(shape))
