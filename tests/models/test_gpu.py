"""The way of the blocks is tested without a GPU; what a GPU computes is compared with the CPU where there is one."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from models import stacked
from models.checkpoint import Checkpoint, load, to_bytes
from models.gpu import GPU_BLOCK_ROWS, BlockPipeline
from models.inference import Reweighter
from schemas.errors import SettingsError
from schemas.models import ModelCard, Precision

DIM, DIM_ON_GPU = 8, 256
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class LateSlot:
    """Doubles rows, but only when asked to finish, as a GPU may; notices when it is used for two blocks at once."""

    def __init__(self) -> None:
        self.block: tuple[Tensor, Sequence[Tensor]] | None = None

    def start(self, rows: Tensor, results: Sequence[Tensor]) -> None:
        assert self.block is None
        self.block = rows.clone(), results

    def finish(self) -> None:
        assert self.block is not None
        rows, (doubled, sums) = self.block
        self.block = None
        if rows.isnan().any():
            raise ValueError("NaN")
        doubled.copy_(2 * rows)
        sums.copy_(rows.sum(dim=1))


def run(pipeline: BlockPipeline, x: Tensor) -> Tensor:
    doubled, sums = torch.full_like(x, torch.nan), torch.full((len(x),), torch.nan)
    pipeline(x, [doubled, sums])
    torch.testing.assert_close(sums, x.sum(dim=1))
    return doubled


@pytest.mark.parametrize("n_rows", [0, 1, GPU_BLOCK_ROWS, GPU_BLOCK_ROWS + 1, 7 * GPU_BLOCK_ROWS - 3])
@pytest.mark.parametrize("slots", [1, 3])
def test_every_block_is_computed_and_slots_are_used_again(n_rows: int, slots: int) -> None:
    made: list[LateSlot] = []

    def new_slot() -> LateSlot:
        made.append(LateSlot())
        return made[-1]

    pipeline, x = BlockPipeline(new_slot, slots), torch.randn(n_rows, DIM)
    for _ in range(2):
        assert torch.equal(run(pipeline, x), 2 * x)
    assert len(made) <= min(slots, -(-n_rows // GPU_BLOCK_ROWS))


def test_threads_share_the_slots() -> None:
    pipeline, start = BlockPipeline(LateSlot, 3), threading.Barrier(8)
    x = torch.randn(5 * GPU_BLOCK_ROWS + 9, DIM)

    def work(shift: int) -> bool:
        start.wait()
        return all(torch.equal(run(pipeline, x[shift:]), 2 * x[shift:]) for _ in range(3))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_a_failure_leaves_no_slot_behind() -> None:
    pipeline, x = BlockPipeline(LateSlot, 1), torch.randn(3, DIM)
    with pytest.raises(ValueError, match="NaN"):
        run(pipeline, torch.full_like(x, torch.nan))
    assert torch.equal(run(pipeline, x), 2 * x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_lower_precision_needs_a_gpu(checkpoint: Callable[..., Checkpoint]) -> None:
    with pytest.raises(SettingsError, match='precision "tf32" needs a GPU'):
        Reweighter(checkpoint(), precision="tf32")


ENSEMBLE = {"architecture": "dual_branch_ensemble", "members": 2, "whitening": 0.5}


@pytest.fixture
def checkpoint(trained: Callable[..., torch.nn.Module]) -> Callable[..., Checkpoint]:
    def make(use_batch_stat: bool = False, architecture: str = "dual_branch", **arguments: object) -> Checkpoint:
        arguments["use_batch_stat"] = use_batch_stat
        card = ModelCard(
            architecture=architecture,
            arguments={"feature_dim": DIM_ON_GPU, **arguments},
            mode="batch_stat" if use_batch_stat else "per_sample",
            embedding_dim=DIM_ON_GPU,
            normalisation="l2",
        )
        return load(to_bytes(card, trained(DIM_ON_GPU, architecture=architecture, **arguments)))

    return make


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("use_batch_stat", [False, True])
@pytest.mark.parametrize("model", [{}, ENSEMBLE])
@pytest.mark.parametrize(("precision", "error"), [("float32", 2e-6), ("tf32", 3e-3), ("bf16", 3e-2)])
def test_rows_get_the_same_bits_in_any_company(
    checkpoint: Callable[..., Checkpoint],
    use_batch_stat: bool,
    model: dict[str, object],
    precision: Precision,
    error: float,
) -> None:
    saved, x = checkpoint(use_batch_stat, **model), embeddings(30_000)
    reweighter = Reweighter(saved, device="cuda", precision=precision)
    on_cpu, on_gpu = Reweighter(saved, device="cpu")(x, branches=True), reweighter(x, branches=True)
    for name, features in on_cpu.items():
        assert np.linalg.norm(on_gpu[name] - features) < error * np.linalg.norm(features)
    for part in (slice(0, 1), slice(5, 5000), slice(4097, None), slice(None, None, 3)):
        np.testing.assert_array_equal(reweighter(x[part])["front"], on_gpu["front"][part])
    np.testing.assert_array_equal(reweighter.query(x[7]), on_gpu["front"][7])
    with ThreadPoolExecutor(6) as pool:
        for front in pool.map(lambda _: reweighter(x)["front"], range(12)):
            np.testing.assert_array_equal(front, on_gpu["front"])


@pytest.mark.gpu
@NEEDS_GPU
def test_without_a_kernel_it_takes_more_steps(
    checkpoint: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, x = checkpoint(**ENSEMBLE), embeddings(5000)
    with_kernel = Reweighter(saved, device="cuda")(x)["front"]
    monkeypatch.setattr(stacked, "_mix_kernel", lambda: None)
    np.testing.assert_allclose(Reweighter(saved, device="cuda")(x)["front"], with_kernel, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@NEEDS_GPU
def test_a_batch_is_one_block_of_its_own_size(checkpoint: Callable[..., Checkpoint]) -> None:
    saved, x = checkpoint(use_batch_stat=True), embeddings(9000)
    for rows in (x, x[:100]):
        on_gpu, on_cpu = (Reweighter(saved, "batch", device)(rows)["front"] for device in ("cuda", "cpu"))
        np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-5, rtol=1e-5)


def embeddings(n_rows: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n_rows, DIM_ON_GPU), dtype=np.float32)
