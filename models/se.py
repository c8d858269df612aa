"""The squeeze-and-excitation block on vectors, and the frozen statistic that makes its batch mode reproducible.

An embedding has no spatial extent, so nothing is pooled: the vector itself (`per_sample`) or the mean vector
(`batch_stat`) is the squeezed statistic. Training loops, and the choice of rows to gather over, are left to others.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from schemas.errors import SettingsError, TrainingError
from schemas.models import Statistic


class SEBlock(nn.Module):
    """Scale each channel by a weight in (0, 1) learnt from the squeezed statistic (Hu et al. 2018, arXiv:1709.01507).

    `weights = fc(s)`, `fc = Linear(C, C/r) → ReLU → Linear(C/r, C) → Sigmoid` without biases; the output is
    `x * weights`. Per sample, `s = x`: a row never sees another row. With `use_batch_stat`, `s` is one mean vector that
    all rows share. In `train()` it is the mean of the batch. In `eval()` the attribute `statistic` decides: `"frozen"`
    (default) takes the mean kept by `gather_statistics`, or, when none was gathered, the mean of the batch as in the
    published definition; `"batch"` always takes the mean of the batch.

    Args:
        channels: C, the length of the vectors.
        reduction: r; the bottleneck has C // r units. `SettingsError` when that is less than 1.
        use_batch_stat: squeeze over the batch instead of per sample.
    """

    frozen_mean: Tensor  # [C], only with use_batch_stat
    frozen_rows: Tensor  # int64 scalar: how many rows the mean was taken over; 0 = not gathered

    def __init__(self, channels: int, reduction: int = 16, use_batch_stat: bool = False) -> None:
        super().__init__()
        if channels < 1 or reduction < 1 or channels // reduction < 1:
            raise SettingsError(
                f"an SE block of {channels} channels with reduction {reduction} has {channels}/{reduction} < 1 hidden "
                f"units; choose a reduction from 1 to the number of channels"
            )
        self.channels = channels
        self.use_batch_stat = use_batch_stat
        self.statistic: Statistic = "frozen"
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )
        if use_batch_stat:
            self.register_buffer("frozen_mean", torch.zeros(channels))
            self.register_buffer("frozen_rows", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x * weights(x)`, `[batch, channels]` as x. Raises `ValueError` for any other shape."""
        return x * self.weights(x)

    def weights(self, x: Tensor) -> Tensor:
        """Return the channel weights: `[batch, channels]` per sample, `[1, channels]` with a batch statistic."""
        if x.dim() != 2 or x.shape[1] != self.channels:
            raise ValueError(f"the SE block wants [batch, {self.channels}], not {list(x.shape)}")
        weights: Tensor = self.fc(self._squeeze(x))
        return weights

    @property
    def gathered(self) -> bool:
        """Whether a frozen mean is there to be used."""
        return self.use_batch_stat and int(self.frozen_rows) > 0

    def _squeeze(self, x: Tensor) -> Tensor:
        if not self.use_batch_stat:
            return x
        if self.statistic == "frozen" and not self.training and self.gathered:
            return self.frozen_mean[None, :]
        return x.mean(dim=0, keepdim=True)


def gather_statistics(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Freeze the mean input of every batch-statistic SE block of the model, and return the number of rows it took.

    Run it once after training, over the training rows as the network sees them (normalised, not augmented), each
    `[n, D]`. Sums are float64, so how the rows are cut into batches does not show in the result. An earlier statistic
    is replaced; the model's mode (train or eval) is kept. A model without such blocks is left as it is and gives 0.
    Raises `TrainingError` when the batches hold no row.
    """
    blocks = [module for module in model.modules() if isinstance(module, SEBlock) and module.use_batch_stat]
    if not blocks:
        return 0
    sums = [torch.zeros(block.channels, dtype=torch.float64, device=block.frozen_mean.device) for block in blocks]
    hooks = [
        block.register_forward_pre_hook(partial(_add_rows, total)) for block, total in zip(blocks, sums, strict=True)
    ]
    was_training = model.training
    model.eval()
    rows = 0
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
                rows += len(batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if rows == 0:
        raise TrainingError("no row to gather the batch statistic from; give the training rows")
    for block, total in zip(blocks, sums, strict=True):
        block.frozen_mean.copy_(total / rows)
        block.frozen_rows.fill_(rows)
    return rows


def _add_rows(total: Tensor, _block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    total += inputs[0].sum(dim=0, dtype=torch.float64)
