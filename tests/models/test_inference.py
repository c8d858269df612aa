import numpy as np
import pyarrow as pa
import pytest
import torch

from models.checkpoint import Checkpoint, load, to_bytes
from models.dual_branch import DualBranchSENet
from models.inference import Reweighter, normalise
from schemas.errors import BadModelError, SettingsError
from schemas.models import ModelCard

DIM = 64


@pytest.fixture
def checkpoint(trained):
    def make(
        use_batch_stat: bool = False, normalisation: str = "none", mean_norm: float | None = None, **options: object
    ) -> Checkpoint:
        model = trained(DIM, use_batch_stat, **options)
        architecture = "dual_branch" if isinstance(model, DualBranchSENet) else "se"
        arguments = {"feature_dim" if architecture == "dual_branch" else "channels": DIM}
        card = ModelCard(
            architecture=architecture,
            arguments={**arguments, "use_batch_stat": use_batch_stat},
            mode="batch_stat" if use_batch_stat else "per_sample",
            embedding_dim=DIM,
            normalisation=normalisation,
            mean_norm=mean_norm,
        )
        return load(to_bytes(card, model))

    return make


def rows(n: int = 50) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, DIM)).astype(np.float32)


def test_gives_front_and_on_request_the_branches_as_the_network_does(checkpoint):
    saved, x = checkpoint(), rows()
    reweighter = Reweighter(saved, device="cpu")
    features = reweighter(x, branches=True)
    with torch.no_grad():
        eager = saved.model(torch.from_numpy(x), return_branches=True)
    assert list(features) == ["front", "identity", "pose_branch"]
    for ours, expected in zip(features.values(), eager, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5, rtol=1e-5)
    only_front = reweighter(x)
    assert list(only_front) == ["front"]
    np.testing.assert_array_equal(only_front["front"], features["front"])


def test_l2_normalisation_makes_the_scale_of_an_embedding_irrelevant(checkpoint):
    reweighter, x = Reweighter(checkpoint(normalisation="l2"), device="cpu"), rows()
    unit = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    scales = np.geomspace(1e-3, 1e3, len(x), dtype=np.float32)[:, None]
    np.testing.assert_allclose(reweighter(x * scales)["front"], reweighter(unit)["front"], atol=2e-6)
    unscaled = Reweighter(checkpoint(normalisation="none"), device="cpu")
    np.testing.assert_allclose(reweighter(x)["front"], unscaled(unit)["front"], atol=2e-6)


def test_normalise_survives_sizes_whose_squares_do_not_fit_float32():
    x = torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]])
    scaled = normalise(x, "l2")
    torch.testing.assert_close(scaled[:2], torch.tensor([[0.6, 0.8], [0.6, 0.8]]))
    assert scaled[2].isnan().all()
    assert normalise(x, "none") is x


def test_mean_norm_scales_all_rows_alike_and_keeps_what_their_norms_say(checkpoint):
    x = rows()
    scaled = Reweighter(checkpoint(normalisation="mean_norm", mean_norm=4.0), device="cpu")(x)["front"]
    unscaled = Reweighter(checkpoint(normalisation="none"), device="cpu")((x * (8 / 4)).astype(np.float32))["front"]
    np.testing.assert_array_equal(scaled, unscaled)  # √64 = 8
    with pytest.raises(ValueError, match="needs the mean norm"):
        normalise(torch.from_numpy(x), "mean_norm")


def test_batch_statistic_takes_the_given_rows_and_frozen_does_not(checkpoint):
    saved, x = checkpoint(use_batch_stat=True), rows() + 1
    frozen, batch = (Reweighter(saved, statistic, device="cpu") for statistic in ("frozen", "batch"))
    np.testing.assert_allclose(frozen(x[:5])["front"], frozen(x)["front"][:5], atol=1e-6)
    assert np.abs(batch(x[:5])["front"] - batch(x)["front"][:5]).max() > 1e-3


def test_query_is_independent_of_company_in_every_mode(checkpoint):
    x = rows() + 1
    for saved in (checkpoint(), checkpoint(use_batch_stat=True)):
        frozen = Reweighter(saved, device="cpu")(x)["front"]
        for statistic in ("frozen", "batch"):
            reweighter = Reweighter(saved, statistic, device="cpu")
            np.testing.assert_allclose(reweighter.query(x[7]), frozen[7], atol=1e-6)
            np.testing.assert_allclose(reweighter.query(x[:9]), frozen[:9], atol=1e-6)
            assert reweighter.query(x[7]).shape == (DIM,)


def test_without_a_frozen_mean_batch_works_and_a_query_is_refused(checkpoint):
    saved = checkpoint(use_batch_stat=True, gather=False)
    with pytest.raises(BadModelError, match="no frozen batch statistic"):
        Reweighter(saved, device="cpu")
    reweighter = Reweighter(saved, "batch", device="cpu")
    assert reweighter(rows())["front"].shape == (50, DIM)
    with pytest.raises(BadModelError, match="query vector has no batch"):
        reweighter.query(rows()[0])


def test_se_model_has_front_only(checkpoint):
    saved, x = checkpoint(architecture="se"), rows()
    reweighter = Reweighter(saved, device="cpu")
    assert not reweighter.has_branches
    with torch.no_grad():
        np.testing.assert_allclose(reweighter(x)["front"], saved.model(torch.from_numpy(x)).numpy(), atol=1e-6)
    with pytest.raises(BadModelError, match="no branches"):
        reweighter(x, branches=True)


def test_arrow_memory_is_read_in_place_and_never_written(checkpoint):
    x = rows()
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), DIM)
    view = column.values.to_numpy(zero_copy_only=True).reshape(-1, DIM)
    assert not view.flags.writeable
    for normalisation in ("none", "l2"):
        reweighter = Reweighter(checkpoint(normalisation=normalisation), device="cpu")
        np.testing.assert_array_equal(reweighter(view)["front"], reweighter(x.copy())["front"])
    np.testing.assert_array_equal(view, x)


def test_rows_cut_out_of_a_wider_array_are_understood(checkpoint):
    reweighter, x = Reweighter(checkpoint(), device="cpu"), rows()
    wide = np.concatenate([x, x], axis=1)[:, DIM:]
    np.testing.assert_allclose(reweighter(wide)["front"], reweighter(x)["front"], atol=1e-6)
    np.testing.assert_allclose(reweighter(x[::2])["front"], reweighter(x)["front"][::2], atol=1e-6)


def test_no_rows_give_no_rows(checkpoint):
    for saved in (checkpoint(), checkpoint(use_batch_stat=True)):
        features = Reweighter(saved, device="cpu")(rows(0), branches=True)
        assert [part.shape for part in features.values()] == [(0, DIM)] * 3


def test_misfits_are_named(checkpoint):
    reweighter = Reweighter(checkpoint(), device="cpu")
    with pytest.raises(BadModelError, match="have 32 numbers, the model wants 64"):
        reweighter(rows()[:, :32])
    with pytest.raises(ValueError, match="float64"):
        reweighter(rows().astype(np.float64))
    with pytest.raises(ValueError, match=r"\[64\]"):
        reweighter(rows()[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("use_batch_stat", [False, True])
def test_row_that_is_not_finite_is_named_even_where_it_spoils_its_batch(checkpoint, bad, use_batch_stat):
    x = rows()
    x[31, 5] = bad
    with pytest.raises(BadModelError, match="row 31 of 50: the embedding itself"):
        Reweighter(checkpoint(use_batch_stat), "batch", device="cpu")(x)


def test_zero_row_and_overflow_in_the_network_are_named(checkpoint):
    x = rows()
    x[12] = 0
    with pytest.raises(BadModelError, match="row 12 of 50: the embedding is all zeros"):
        Reweighter(checkpoint(normalisation="l2"), device="cpu")(x)
    Reweighter(checkpoint(), device="cpu")(x)  # without normalisation a zero row is an ordinary row
    x[12] = 3e38
    with pytest.raises(BadModelError, match="row 12 of 50: the embedding is finite"):
        Reweighter(checkpoint(), device="cpu")(x)


def test_large_but_finite_features_pass(checkpoint):
    saved = Checkpoint(DualBranchSENet(DIM).eval(), checkpoint().card, "", None)
    x = np.full((50, DIM), 1e37, dtype=np.float32)  # their sum overflows, they do not
    np.testing.assert_array_equal(Reweighter(saved, device="cpu")(x)["front"], x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused_and_auto_takes_the_cpu(checkpoint):
    with pytest.raises(SettingsError, match="no GPU"):
        Reweighter(checkpoint(), device="cuda")
    assert Reweighter(checkpoint(), device="auto").device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(checkpoint):
    saved, x = checkpoint(normalisation="l2"), rows(3000)
    on_gpu = Reweighter(saved, device="cuda")(x)["front"]
    np.testing.assert_allclose(on_gpu, Reweighter(saved, device="cpu")(x)["front"], atol=1e-5, rtol=1e-5)
