"""The inference graph for a GPU: one product for all branches where `folding` takes them one by one.

A GPU computes a few large products faster than many small ones, and is slowed down by every pass over intermediate
numbers; the CPU is not. The result is that of `FoldedDualBranch` but for the last bits.
"""

import functools
import logging
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.dual_branch import Branches
from models.folding import FoldedDualBranch, FoldedProjection, FoldedWhitening

log = logging.getLogger("frontalis.models")

_gate = torch.cuda.jiterator._create_jit_fn(
    "template <typename T> T gate(T logit, T x) { return x / (T(1) + std::exp(-logit)); }"
)


class StackedDualBranch(nn.Module):
    """The networks of a `FoldedDualBranch` whose statistic is that of each row, or frozen: never that of the batch.

    H is the number of hidden units of a branch, and n the number of branches. A frozen statistic makes a branch's gate
    a constant, which is multiplied into `expand`.
    """

    reduce: Tensor | None  # [n · C/r, D]
    excite: Tensor  # [n, C/r, D]
    expand: Tensor  # [n, D, H]; with a frozen statistic [n · H, D]
    bias: Tensor  # [n, 1, H]; with a frozen statistic [n · H]

    def __init__(self, folded: FoldedDualBranch) -> None:
        super().__init__()
        hidden = folded.hidden
        means = [branch.gate.frozen_mean for branch in hidden]
        if means[0] is None:
            self.register_buffer("reduce", torch.cat([branch.gate.reduce for branch in hidden]))
            self.register_buffer("excite", torch.stack([branch.gate.excite.T for branch in hidden]))
            self.register_buffer("expand", torch.stack([branch.expand.T for branch in hidden]).contiguous())
            self.register_buffer("bias", torch.stack([branch.expand_bias for branch in hidden])[:, None])
        else:
            gates = [branch.gate(cast(Tensor, mean)) for branch, mean in zip(hidden, means, strict=True)]
            self.register_buffer("reduce", None)
            self.register_buffer(
                "expand", torch.cat([branch.expand * gate for branch, gate in zip(hidden, gates, strict=True)])
            )
            self.register_buffer("bias", torch.cat([branch.expand_bias for branch in hidden]))
        self.front, self.identity, self.pose = folded.front, folded.identity, folded.pose
        self.whitening = folded.whitening

    def forward(self, x: Tensor, return_branches: bool = False) -> Tensor | Branches:
        """Return front, or (front, identity, pose), for `[n, D]` embeddings; each `[n, D]`."""
        hidden = self._hidden(x)
        change = functional.linear(hidden, self.front.project, self.front.project_bias)
        front = x + change if self.whitening is None else _mix(self.whitening, change, x)
        if not return_branches:
            return front
        half = hidden.shape[1] // 2
        return front, _project(self.identity, hidden[:, :half], x), _project(self.pose, hidden[:, half:], x)

    def _hidden(self, x: Tensor) -> Tensor:
        if self.reduce is None:
            return functional.linear(x, self.expand, self.bias).relu_()
        squeezed = functional.linear(x, self.reduce).relu_().view(len(x), len(self.excite), -1)
        logits = torch.bmm(squeezed.transpose(0, 1), self.excite)
        rows = x.to(logits.dtype)
        gated = _gate(logits, rows) if x.is_cuda else logits.sigmoid_().mul_(rows)
        hidden = torch.baddbmm(self.bias, gated, self.expand).relu_()
        return hidden.transpose(0, 1).reshape(len(x), -1)


def _project(projection: FoldedProjection, hidden: Tensor, x: Tensor) -> Tensor:
    """Return x plus its change, in the precision of x, whatever the products are computed in."""
    return x + functional.linear(hidden, projection.project, projection.project_bias)


def _mix(whitening: FoldedWhitening, change: Tensor, x: Tensor) -> Tensor:
    """Do as `Whitening.mix` with front = x + change; on a GPU in one pass, which takes a quarter of the time."""
    product = functional.linear(x, whitening.weight)
    kernel = _mix_kernel() if x.is_cuda else None
    if kernel is None:
        return whitening.mix(x + change, x, product)
    mixed = torch.empty_like(x)
    kernel(
        grid=(-(-len(x) // _ROWS_OF_A_BLOCK), 1, 1),
        block=(32 * _ROWS_OF_A_BLOCK, 1, 1),
        args=[x, change.float(), product.float(), whitening.offset, whitening.strength, *x.shape, mixed],
    )
    return mixed


_ROWS_OF_A_BLOCK = 8
_MIX = r"""
__device__ float sum_of_warp(float x) {
    for (int apart = 16; apart; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
    return x;
}

extern "C" __global__ void mix(  // a warp computes a row, all [rows, dim] but offset [dim]
    const float* x, const float* change, const float* product, const float* offset, double strength,
    int rows, int dim, float* mixed)
{
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const long long start = (long long)row * dim;
    x += start; change += start; product += start; mixed += start;

    float xx = 0, ff = 0, yy = 0;
    for (int i = threadIdx.x % 32; i < dim; i += 32) xx += x[i] * x[i];
    const float length = sqrtf(sum_of_warp(xx));
    for (int i = threadIdx.x % 32; i < dim; i += 32) {
        const float front = x[i] + change[i], y = product[i] - length * offset[i];
        ff += front * front;
        yy += y * y;
    }
    const float scale = float(strength) * sqrtf(sum_of_warp(ff)) / fmaxf(sqrtf(sum_of_warp(yy)), 1e-12f);
    for (int i = threadIdx.x % 32; i < dim; i += 32)
        mixed[i] = x[i] + change[i] + scale * (product[i] - length * offset[i]);
}
"""


@functools.cache
def _mix_kernel() -> Callable[..., None] | None:
    try:
        kernel: Callable[..., None] = torch.cuda._compile_kernel(_MIX, "mix")
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        log.warning("this torch compiles no CUDA kernel (%s); re-weighting takes more steps", error)
        return None
    return kernel
