"""Embeddings in, features out: the hot path of every run and query, over plain NumPy arrays.

It scales the rows as the model's card says, runs the inference graph on a device, and raises for a feature that is not
finite. Which rows make a batch, and where they are stored, is left to the tasks.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from models.checkpoint import Checkpoint
from models.folding import FoldedDualBranch, FoldedSE, fold
from models.gpu import BlockPipeline, Compute, GraphSlot, products_in
from models.stacked import StackedDualBranch
from schemas.errors import BadModelError, SettingsError
from schemas.models import Normalisation, Precision, Statistic, uses_batch
from schemas.settings import Device

Rows = NDArray[np.float32]
Network = FoldedSE | FoldedDualBranch | StackedDualBranch


def normalise(x: Tensor, normalisation: Normalisation, mean_norm: float | None = None) -> Tensor:
    """Return rows `[n, D]` as a network wants them.

    `"none"`: unchanged. `"l2"`: each divided by its Euclidean norm; a row of zeros has no direction and becomes NaN,
    which is refused. Norms are taken in float64, so that no row of finite numbers overflows. `"mean_norm"`: all
    multiplied by √D / `mean_norm`, so that channels are of order 1 and the norm, which
    carries the quality of the picture, stays. Raises `ValueError` when that needs a `mean_norm` and gets none.
    """
    if normalisation == "none":
        return x
    if normalisation == "mean_norm":
        if mean_norm is None:
            raise ValueError("normalisation 'mean_norm' needs the mean norm; pass the one of the model card")
        return x.mul(x.shape[1] ** 0.5 / mean_norm)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
    scaled: Tensor = x * norm.reciprocal().to(x.dtype)
    return scaled


def torch_device(wanted: Device) -> Literal["cpu", "cuda"]:
    """Return the device to work on: `"auto"` takes the GPU when there is one.

    Raises `SettingsError` when CUDA is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SettingsError('device "cuda": torch sees no GPU here; choose "cpu" or "auto"')
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


class Reweighter:
    """Re-weights blocks of embeddings with one checkpoint. It is stateless, so threads may share it.

    Args:
        checkpoint: the model and its card.
        statistic: for a `batch_stat` model: its `"frozen"` mean, or the mean of each given block (`"batch"`). Without
            effect for a `per_sample` model.
        device: `"auto"` takes the GPU when there is one.
        precision: of the products on a GPU, see `models.gpu`. With the statistic `"batch"` it is always float32.

    On one GPU a row's features have the same bits whatever rows it comes with, unless the statistic is `"batch"`. They
    may differ from the CPU's in the last bits.

    Raises `BadModelError` when the frozen mean is asked for and the model has none, `SettingsError` when CUDA, or a
    precision other than float32, is asked for and there is no GPU.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        statistic: Statistic = "frozen",
        device: Device = "auto",
        precision: Precision = "float32",
    ) -> None:
        self.device = torch.device(torch_device(device))
        if precision != "float32" and self.device.type == "cpu":
            raise SettingsError(f'precision "{precision}" needs a GPU, and this is the CPU; choose "float32"')
        self.embedding_dim = checkpoint.card.embedding_dim
        self._precision = precision
        self._by_batch = uses_batch(checkpoint.card.mode, statistic)
        self._checkpoint = checkpoint
        folded = fold(checkpoint.model, statistic)
        self.has_branches = isinstance(folded, FoldedDualBranch)
        if self.device.type == "cuda" and isinstance(folded, FoldedDualBranch) and not self._by_batch:
            self._network: Network = StackedDualBranch(folded).to(self.device)
        else:
            self._network = folded.to(self.device)
        self._pipelines: dict[tuple[object, bool], BlockPipeline] = {}

    def __call__(self, x: Rows, branches: bool = False) -> dict[str, Rows]:
        """Return `front`, and with `branches` also `identity` and `pose_branch`, each float32 `[n, D]`.

        Args:
            x: float32 `[n, D]`, as stored (not normalised); read-only arrays are welcome and are not copied.
            branches: `BadModelError` for an architecture without branches, see `has_branches`.

        Raises `BadModelError` naming the first row whose feature is not finite, or the dimension that does not fit;
        `ValueError` for anything but a two-dimensional float32 array.
        """
        if branches and not self.has_branches:
            raise BadModelError("this model has no branches; ask for front only, or use a dual_branch model")
        return self._run(self._network, x, branches)

    def query(self, x: Rows) -> Rows:
        """Return front for one vector `[D]`, or for several `[n, D]` each as if it came alone.

        A `batch_stat` model uses its frozen mean, also with `statistic="batch"`, since a query has no batch; when it
        has none, `BadModelError`.
        """
        front = self._run(self._query_network, np.atleast_2d(x), branches=False)["front"]
        return front[0] if x.ndim == 1 else front

    @cached_property
    def _query_network(self) -> Network:
        if not self._by_batch:
            return self._network
        try:
            return fold(self._checkpoint.model, "frozen").to(self.device)
        except BadModelError as error:
            raise BadModelError(
                "a query vector has no batch to take the mean of, and the model holds no frozen batch statistic; "
                "train it again so that one is gathered"
            ) from error

    def _run(self, network: Network, x: Rows, branches: bool) -> dict[str, Rows]:
        if x.ndim != 2 or x.dtype != np.float32:
            raise ValueError(f"embeddings must be float32 [n, {self.embedding_dim}], not {x.dtype} {list(x.shape)}")
        if x.shape[1] != self.embedding_dim:
            raise BadModelError(
                f"the embeddings have {x.shape[1]} numbers, the model wants {self.embedding_dim}; use another model"
            )
        names = ("front", "identity", "pose_branch") if branches else ("front",)
        if len(x) == 0:
            return {name: np.empty_like(x) for name in names}
        with torch.inference_mode():
            # DLPack, unlike from_numpy, takes the read-only arrays that Arrow gives without a copy or a warning.
            *outputs, row_sums = self._outputs(network, from_dlpack(x), branches)
        features = dict(zip(names, (output.numpy() for output in outputs), strict=True))
        if not row_sums.isfinite().all():  # far cheaper than a look at each number, and misses none
            _refuse_non_finite(x, features["front"], self._normalisation)
        return features

    def _outputs(self, network: Network, x: Tensor, branches: bool) -> Sequence[Tensor]:
        """Return the features, each `[n, D]`, and the sum of each row of front, `[n]`, in main memory."""

        def compute(rows: Tensor) -> tuple[Tensor, ...]:
            scaled = normalise(rows, self._normalisation, self._checkpoint.card.mean_norm)
            features = network(scaled, return_branches=True) if branches else (network(scaled),)
            return *features, features[0].sum(dim=1)

        if self.device.type == "cpu":
            return compute(x)
        if self._by_batch and network is self._network:
            with products_in("float32"):
                return [output.cpu() for output in compute(x.to(self.device))]
        outputs = [torch.empty(x.shape, pin_memory=True) for _ in range(3 if branches else 1)]
        outputs.append(torch.empty(len(x), pin_memory=True))
        self._pipeline(network, branches, compute)(x, outputs)
        return outputs

    def _pipeline(self, network: nn.Module, branches: bool, compute: Compute) -> BlockPipeline:
        def new_slot() -> GraphSlot:
            return GraphSlot(compute, self.embedding_dim, self._precision)

        return self._pipelines.setdefault((network, branches), BlockPipeline(new_slot))

    @property
    def _normalisation(self) -> Normalisation:
        return self._checkpoint.card.normalisation


def _refuse_non_finite(x: Rows, front: Rows, normalisation: Normalisation) -> None:
    """Raise for the first bad row. Front mixes both branches, so a bad number in either of them shows in it too."""
    bad = np.flatnonzero(~np.isfinite(front).all(axis=1))
    if len(bad) == 0:
        return
    row = int(bad[0])
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])  # under a batch statistic it spoils the other rows
        why = "the embedding itself holds NaN or infinity"
    elif normalisation == "l2" and not x[row].any():
        why = "the embedding is all zeros and has no direction"
    else:
        why = "the embedding is finite, the network's output is not"
    raise BadModelError(f"row {row} of {len(x)}: {why}; quarantine such rows before re-weighting")
