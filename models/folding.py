"""The inference graph: the same numbers as the network in `eval()`, in fewer and faster steps.

BatchNorm and dropout disappear into the layer before them, the activations into the matrix products, and rows run in
blocks that stay in the cache. Scaling inputs and choosing a device is left to `models.inference`.

What was measured (D = 512, one core of a Zen 5 EPYC, torch 2.13, 4,096 rows): 85–104 ms eager, 82 ms folded on MKL,
37 ms folded on oneDNN, of which 33 ms is the four large products at the speed the core can do. Hence oneDNN below, and
hence no concatenated layers: one product twice as wide takes exactly twice as long.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.dual_branch import (
    Branches,
    DualBranchEnsemble,
    DualBranchSENet,
    ResidualBranch,
    members_of,
    whitening_of,
)
from models.se import SEBlock
from models.whitening import Whitening
from schemas.errors import BadModelError
from schemas.models import Statistic

_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
_BLOCK_ROWS = 1024  # measured at D = 512: 512 to 1,024 rows are 7% faster than 4,096 on one core; tails cost nothing


def fold(model: nn.Module, statistic: Statistic = "frozen") -> "FoldedSE | FoldedDualBranch":
    """Return the inference graph of an `SEBlock`, `DualBranchSENet` or `DualBranchEnsemble`, in memory of its own.

    Equal to the model in `eval()` with the same `statistic` to 1e-5 of the size of x. Per sample, a row's result does
    not depend on the other rows, and `statistic` has no effect. Raises `BadModelError` when the frozen mean is asked
    for and was not gathered, `TypeError` for another kind of model.
    """
    if isinstance(model, SEBlock):
        return FoldedSE(FoldedGate(model, statistic))
    if isinstance(model, DualBranchSENet | DualBranchEnsemble):
        return FoldedDualBranch(model, statistic)
    raise TypeError(f"no inference graph for {type(model).__name__}; add one in models.folding")


class FoldedSE(nn.Module):
    """An SE block as the whole model. It has no branches."""

    def __init__(self, gate: "FoldedGate") -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of `[n, D]` embeddings, same shape."""
        squeezed = self.gate.squeeze(x)
        front = torch.empty_like(x)
        for block in _blocks(x):
            rows = x[block]
            torch.mul(rows, self.gate(rows if squeezed is None else squeezed), out=front[block])
        return front


class FoldedDualBranch(nn.Module):
    """One dual-branch network or an ensemble of them, as one wide network.

    All branches write their hidden units side by side; one product with the last layers below one another, weighted by
    α and the number of members, gives front. Front is the same, bit for bit, with branches asked for or not.
    """

    def __init__(self, model: DualBranchSENet | DualBranchEnsemble, statistic: Statistic) -> None:
        super().__init__()
        members = [member for member in members_of(model) if isinstance(member, DualBranchSENet)]
        identity = [member.identity_branch for member in members]
        pose = [member.pose_branch for member in members]
        alpha = [member.alpha.item() for member in members]
        even = [1 / len(members)] * len(members)
        self.hidden = [FoldedHidden(branch, statistic) for branch in identity + pose]
        self.parts = nn.ModuleList(self.hidden)  # so that they move to the device with the rest
        self.front = FoldedProjection(
            identity + pose, [share / len(members) for share in alpha + [1 - share for share in alpha]]
        )
        self.identity = FoldedProjection(identity, even)
        self.pose = FoldedProjection(pose, even)
        whitening = whitening_of(model)
        self.whitening = FoldedWhitening(whitening) if whitening is not None else None

    def forward(self, x: Tensor, return_branches: bool = False) -> Tensor | Branches:
        """Return front, or (front, identity, pose), for `[n, D]` embeddings; each `[n, D]`."""
        outputs = [torch.empty_like(x) for _ in range(3 if return_branches else 1)]
        squeezed = [branch.gate.squeeze(x) for branch in self.hidden]
        for block in _blocks(x):
            rows = x[block]
            hidden = torch.cat([branch(rows, one) for branch, one in zip(self.hidden, squeezed, strict=True)], dim=1)
            front = self.front(hidden, rows)
            outputs[0][block] = front if self.whitening is None else self.whitening(front, rows)
            if return_branches:
                half = hidden.shape[1] // 2
                outputs[1][block] = self.identity(hidden[:, :half], rows)
                outputs[2][block] = self.pose(hidden[:, half:], rows)
        return (outputs[0], outputs[1], outputs[2]) if return_branches else outputs[0]


class FoldedHidden(nn.Module):
    """The first half of a residual branch, up to its hidden units: gate, affine map, ReLU."""

    expand: Tensor  # [H, D], with BatchNorm's scale
    expand_bias: Tensor

    def __init__(self, branch: ResidualBranch, statistic: Statistic) -> None:
        super().__init__()
        self.gate = FoldedGate(branch.se, statistic)
        weight, bias = _fold_norm(branch.expand, branch.norm)
        self.register_buffer("expand", weight)
        self.register_buffer("expand_bias", bias)

    def forward(self, rows: Tensor, squeezed: Tensor | None) -> Tensor:
        """Return the hidden units of some rows, `[n, H]`; `squeezed` is the shared statistic, if there is one."""
        gated = self.gate(rows if squeezed is None else squeezed) * rows
        return _affine(gated, self.expand, self.expand_bias, "relu")


class FoldedProjection(nn.Module):
    """The last layers of several residual branches below one another, each weighted by its share in the output."""

    project: Tensor  # [D, sum of H]
    project_bias: Tensor

    def __init__(self, branches: Sequence[ResidualBranch], shares: Sequence[float]) -> None:
        super().__init__()
        weighted = list(zip(branches, shares, strict=True))
        with torch.no_grad():
            weight = torch.cat([branch.project.weight.double() * share for branch, share in weighted], dim=1)
            bias = torch.stack([branch.project.bias.double() * share for branch, share in weighted]).sum(dim=0)
        self.register_buffer("project", weight.float())
        self.register_buffer("project_bias", bias.float())

    def forward(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return rows plus their change, `[n, D]`."""
        return _affine(hidden, self.project, self.project_bias, "none").add_(rows)


class FoldedWhitening(Whitening):
    """`Whitening` with the fast product."""

    def __init__(self, whitening: Whitening) -> None:
        super().__init__(len(whitening.offset), whitening.strength)
        self.load_state_dict(whitening.state_dict())

    def forward(self, front: Tensor, x: Tensor) -> Tensor:
        """Return the mixture, `[n, D]`."""
        return self.mix(front, x, _affine(x, self.weight, None, "none"))


class FoldedGate(nn.Module):
    """Channel weights from the squeezed statistic."""

    reduce: Tensor  # [C/r, C]
    excite: Tensor  # [C, C/r]
    frozen_mean: Tensor | None  # [1, C]

    def __init__(self, block: SEBlock, statistic: Statistic) -> None:
        super().__init__()
        frozen = block.use_batch_stat and statistic == "frozen"
        if frozen and not block.gathered:
            raise BadModelError(
                "the model holds no frozen batch statistic; train it again so that one is gathered, or choose "
                'statistic = "batch"'
            )
        self.per_sample = not block.use_batch_stat
        self.register_buffer("reduce", block.get_parameter("fc.0.weight").detach().clone())
        self.register_buffer("excite", block.get_parameter("fc.2.weight").detach().clone())
        self.register_buffer("frozen_mean", block.frozen_mean[None, :].clone() if frozen else None)

    def squeeze(self, x: Tensor) -> Tensor | None:
        """Return the statistic `[1, C]` that all rows of x share, or None where each row is its own."""
        if self.per_sample:
            return None
        if self.frozen_mean is not None:
            return self.frozen_mean
        return x.mean(dim=0, keepdim=True, dtype=torch.float64).to(x.dtype)  # float64: the same on any thread count

    def forward(self, squeezed: Tensor) -> Tensor:
        """Return the weights in (0, 1), same shape as the statistic."""
        return _affine(_affine(squeezed, self.reduce, None, "relu"), self.excite, None, "sigmoid")


def _blocks(x: Tensor) -> list[slice]:
    size = _BLOCK_ROWS if x.device.type == "cpu" else max(len(x), 1)
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _fold_norm(linear: nn.Linear, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the one affine map that `linear` (without bias) and `norm` in eval are together."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        weight = linear.weight.double() * scale[:, None]
        bias = norm.bias.double() - norm.running_mean.double() * scale
    return weight.to(linear.weight.dtype), bias.to(linear.weight.dtype)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Return `activation(x @ weight.T + bias)`.

    On the CPU it is the oneDNN operator that torch.compile emits for the same expression: `functional.linear` goes to
    MKL, which does not use AVX-512 on AMD. Where this build of torch lacks it, and on a GPU, plain torch does the same.
    A single row would take another path in oneDNN and end in other last bits than the same row in company; as one of
    two it does not, so that a query finds exactly the feature that was stored.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and _HAS_ONEDNN:
        rows = x.repeat(2, 1) if len(x) == 1 else x
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, activation, [], "")
        return fused[: len(x)]
    y = functional.linear(x, weight, bias)
    if activation == "relu":
        return y.relu_()
    return y.sigmoid_() if activation == "sigmoid" else y
