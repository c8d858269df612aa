import pytest
import torch
from torch import nn

from models.dual_branch import DualBranchEnsemble, DualBranchSENet
from models.folding import _BLOCK_ROWS, fold
from models.stacked import StackedDualBranch
from schemas.errors import BadModelError


@pytest.mark.parametrize("dim", [512, 192, 128])
@pytest.mark.parametrize("use_batch_stat", [False, True])
@pytest.mark.parametrize("rows", [1, 100, _BLOCK_ROWS + 1])
def test_folded_equals_eager_after_training(trained, dim, use_batch_stat, rows):
    model = trained(dim, use_batch_stat)
    assert not torch.allclose(model.pose_branch.norm.running_var, torch.ones(dim), atol=0.1)
    x = torch.randn(rows, dim)
    with torch.inference_mode():
        folded = fold(model)
        for ours, eager in zip(folded(x, return_branches=True), model(x, return_branches=True), strict=True):
            assert not torch.allclose(eager, x, atol=0.1)
            torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-5)
        assert torch.equal(folded(x), folded(x, return_branches=True)[0])


@pytest.mark.parametrize("dim", [512, 64])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("whitening", [0.0, 0.5])
@pytest.mark.parametrize("use_batch_stat", [False, True])
def test_folded_ensemble_equals_eager_after_training(trained, dim, members, use_batch_stat, whitening):
    sizes = {"members": members, "hidden_dim": 40, "whitening": whitening}
    model = trained(dim, use_batch_stat, architecture="dual_branch_ensemble", **sizes)
    x = torch.randn(_BLOCK_ROWS + 9, dim)
    with torch.inference_mode():
        folded = fold(model)
        for ours, eager in zip(folded(x, return_branches=True), model(x, return_branches=True), strict=True):
            assert not torch.allclose(eager, x, atol=0.1)
            torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-5)
        assert torch.equal(folded(x), folded(x, return_branches=True)[0])


@pytest.mark.parametrize("architecture", ["se", "dual_branch", "dual_branch_ensemble"])
def test_folded_batch_statistic_is_the_mean_of_all_given_rows_across_blocks(trained, architecture):
    model = trained(128, True, architecture=architecture)
    for module in model.modules():
        if hasattr(module, "statistic"):
            module.statistic = "batch"
    x = torch.randn(_BLOCK_ROWS + 300, 128) + torch.linspace(0, 3, _BLOCK_ROWS + 300)[:, None]
    with torch.inference_mode():
        folded = fold(model, "batch")
        torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(folded(x[:100]), folded(x)[:100], atol=1e-3)


@pytest.mark.parametrize("use_batch_stat", [False, True])
def test_folded_se_equals_eager(trained, use_batch_stat):
    model = trained(192, use_batch_stat, architecture="se")
    x = torch.randn(_BLOCK_ROWS + 5, 192)
    with torch.inference_mode():
        torch.testing.assert_close(fold(model)(x), model(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("use_batch_stat", [False, True])
def test_row_does_not_depend_on_other_rows_or_its_place(trained, use_batch_stat):
    x = torch.randn(_BLOCK_ROWS + 50, 128)
    folded = fold(trained(128, use_batch_stat))
    with torch.inference_mode():
        together = folded(x)
        order = torch.randperm(len(x))
        torch.testing.assert_close(folded(x[order]), together[order], atol=1e-6, rtol=1e-6)
        for row in (0, _BLOCK_ROWS - 1, _BLOCK_ROWS, len(x) - 1):
            torch.testing.assert_close(folded(x[row : row + 1])[0], together[row], atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="equal bits were measured on AVX-512")
@pytest.mark.parametrize("arguments", [{}, {"architecture": "dual_branch_ensemble", "whitening": 0.5}])
def test_bits_of_a_row_do_not_depend_on_company_place_or_threads(trained, arguments):
    x = torch.randn(_BLOCK_ROWS + 50, 512)
    folded = fold(trained(512, False, **arguments))
    with torch.inference_mode():
        together = folded(x)
        for start, stop in ((0, 1), (3, 5), (3, 20), (7, _BLOCK_ROWS + 8), (40, len(x))):
            assert torch.equal(folded(x[start:stop]), together[start:stop]), (start, stop)
        assert torch.equal(folded(x.flip(0)).flip(0), together)
        torch.set_num_threads(2)
        try:
            assert torch.equal(folded(x), together)
        finally:
            torch.set_num_threads(1)


def test_untrained_network_still_gives_back_its_input_exactly():
    x = torch.randn(70, 128) * 40
    with torch.inference_mode():
        whitened = DualBranchEnsemble(feature_dim=128, whitening=0.5)
        for model in (DualBranchSENet(128), DualBranchEnsemble(feature_dim=128), whitened):
            assert torch.equal(fold(model.eval())(x), x)


def test_plain_torch_path_agrees_with_onednn(trained, monkeypatch):
    x = torch.randn(64, 128)
    folded = fold(trained(128, False))
    with torch.inference_mode():
        fast = folded(x)
        monkeypatch.setattr("models.folding._HAS_ONEDNN", False)
        torch.testing.assert_close(folded(x), fast, atol=1e-5, rtol=1e-5)


def test_folded_network_keeps_its_weights_when_the_model_trains_on(trained):
    model = trained(64, False)
    x = torch.randn(8, 64)
    with torch.inference_mode():
        folded = fold(model)
        before = folded(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with torch.inference_mode():
        assert torch.equal(folded(x), before)


def test_frozen_statistic_that_was_never_gathered_is_refused(trained):
    with pytest.raises(BadModelError, match="no frozen batch statistic"):
        fold(trained(64, True, gather=False))
    fold(trained(64, True, gather=False), "batch")


def test_unknown_network_is_refused():
    with pytest.raises(TypeError, match="no inference graph for Linear"):
        fold(nn.Linear(3, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(trained):
    x = torch.randn(3000, 512)
    folded = fold(trained(512, False))
    with torch.inference_mode():
        on_cpu = folded(x)
        torch.testing.assert_close(folded.cuda()(x.cuda()).cpu(), on_cpu, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_batch_stat", [False, True])
@pytest.mark.parametrize("options", [{}, {"architecture": "dual_branch_ensemble", "members": 2, "whitening": 0.5}])
def test_branches_in_one_product_give_the_same(trained, use_batch_stat, options):
    folded, x = fold(trained(64, use_batch_stat, **options)), torch.randn(300, 64)
    stacked = StackedDualBranch(folded)
    with torch.inference_mode():
        expected = folded(x, return_branches=True)
        torch.testing.assert_close(stacked(x, return_branches=True), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stacked(x), expected[0], atol=1e-5, rtol=1e-5)
