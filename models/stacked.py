"""The inference graph for a GPU: one product for all branches where `folding` takes them one by one.

A GPU computes a few large products faster than many small ones, and is slowed down by every pass over intermediate
numbers; the CPU is not. The result is that of `FoldedDualBranch` but for the last bits.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.dual_branch import Branches
from models.folding import FoldedDualBranch, FoldedProjection, FoldedWhitening

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
        front = _project(self.front, hidden, x)
        if self.whitening is not None:
            front = _mix(self.whitening, front, x)
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


def _mix(whitening: FoldedWhitening, front: Tensor, x: Tensor) -> Tensor:
    """Do as `Whitening.mix` in fewer passes."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    y = torch.addcmul(functional.linear(x, whitening.weight), length, whitening.offset, value=-1)
    scale = whitening.strength * torch.linalg.vector_norm(front, dim=1, keepdim=True)
    scale /= torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp_min(1e-12)
    return torch.addcmul(front, y, scale)
