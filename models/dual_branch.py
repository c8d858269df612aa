"""The dual-branch network: one branch keeps what agrees between views, the other learns the change from side to front.

Both branches are residual and start at zero change, so an untrained network gives its input back and training can move
away from the raw embedding only on purpose. An ensemble of such networks makes fewer mistakes than one. Losses and
training are left to others.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.se import SEBlock
from models.whitening import Whitening
from schemas.errors import SettingsError

Branches = tuple[Tensor, Tensor, Tensor]


class DualBranchSENet(nn.Module):
    """Fuse two residual squeeze-and-excitation branches: `front = α·identity + (1 − α)·pose`.

    Each branch is `x + FC(Dropout(ReLU(BN(FC(SE(x))))))` with its last layer at zero in the beginning.

    Args:
        feature_dim: D, the length of embeddings and features.
        reduction: bottleneck of the SE blocks, see `SEBlock`.
        fusion_alpha: α at the start, in (0, 1). It is kept as a logit, so that learning never leaves (0, 1).
        learnable_fusion: whether training may change α.
        use_batch_stat: the SE blocks squeeze over the batch instead of per sample.
        hidden_dim: width inside a branch; `None` means D.
        dropout: probability of dropping a hidden unit in training, in [0, 1).

    Raises `SettingsError` for a value outside these ranges.
    """

    fusion_logit: Tensor

    def __init__(
        self,
        feature_dim: int = 512,
        reduction: int = 16,
        fusion_alpha: float = 0.7,
        learnable_fusion: bool = True,
        use_batch_stat: bool = False,
        hidden_dim: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 < fusion_alpha < 1:
            raise SettingsError(f"fusion_alpha is {fusion_alpha}; choose a value between 0 and 1, both excluded")
        if not 0 <= dropout < 1:
            raise SettingsError(f"dropout is {dropout}; choose a value from 0 to less than 1")
        hidden = feature_dim if hidden_dim is None else hidden_dim
        if hidden < 1:
            raise SettingsError(f"hidden_dim is {hidden}; a branch needs at least one hidden unit")
        self.feature_dim = feature_dim
        self.identity_branch = ResidualBranch(SEBlock(feature_dim, reduction, use_batch_stat), hidden, dropout)
        self.pose_branch = ResidualBranch(SEBlock(feature_dim, reduction, use_batch_stat), hidden, dropout)
        logit = _logit(fusion_alpha)
        if learnable_fusion:
            self.fusion_logit = nn.Parameter(logit)
        else:
            self.register_buffer("fusion_logit", logit)

    def forward(self, x: Tensor, return_branches: bool = False) -> Tensor | Branches:
        """Return front, or (front, identity, pose) with `return_branches`; all `[batch, feature_dim]` as x."""
        identity: Tensor = self.identity_branch(x)
        pose: Tensor = self.pose_branch(x)
        front = torch.lerp(pose, identity, self.alpha)  # exact where the branches agree, which α·i + (1 − α)·p is not
        return (front, identity, pose) if return_branches else front

    @property
    def alpha(self) -> Tensor:
        """The share of the identity branch in front: a scalar tensor that gradients flow through."""
        alpha: Tensor = torch.sigmoid(self.fusion_logit)
        return alpha


class DualBranchEnsemble(nn.Module):
    """The mean of several dual-branch networks that were trained apart: of their fronts, identities and poses.

    A plain mean, since a sum of L2-normalised outputs measured the same (docs/training.md) and is not linear. Into
    front, not into the branches, the whitened row may be mixed: one more member, as it were, that was not trained.

    Args:
        members: how many networks; `SettingsError` for less than one.
        hidden_dim: width inside a branch; three members of 128 cost what one of 512 costs.
        whitening: the strength of `models.whitening.Whitening`; 0 for none, `SettingsError` for less.
        arguments: of each member, see `DualBranchSENet`.
    """

    def __init__(
        self, members: int = 3, hidden_dim: int | None = 128, whitening: float = 0.0, **arguments: Any
    ) -> None:
        super().__init__()
        if members < 1:
            raise SettingsError(f"members is {members}; an ensemble needs at least one")
        if whitening < 0:
            raise SettingsError(f"whitening is {whitening}; choose 0 for none, or more")
        self.members = nn.ModuleList(DualBranchSENet(hidden_dim=hidden_dim, **arguments) for _ in range(members))
        dims = {member.feature_dim for member in self.members if isinstance(member, DualBranchSENet)}
        self.whitening = Whitening(dims.pop(), whitening) if whitening else None

    def forward(self, x: Tensor, return_branches: bool = False) -> Tensor | Branches:
        """Return front, or (front, identity, pose) with `return_branches`; all `[batch, feature_dim]` as x."""
        outputs = [member(x, return_branches=True) for member in self.members]
        front, identity, pose = (
            x + torch.stack([one - x for one in part]).mean(dim=0) for part in zip(*outputs, strict=True)
        )
        if self.whitening is not None:
            front = self.whitening(front, x)
        return (front, identity, pose) if return_branches else front


def members_of(model: nn.Module) -> list[nn.Module]:
    """Return the networks that are trained apart: those of an ensemble, or the model itself."""
    return list(model.members) if isinstance(model, DualBranchEnsemble) else [model]


def whitening_of(model: nn.Module) -> Whitening | None:
    """Return the map whose output is mixed into front, or None where the model has none."""
    return model.whitening if isinstance(model, DualBranchEnsemble) else None


def scale_change(model: nn.Module, share: float) -> None:
    """Make every residual branch of the model, in place, go only so far from x: `x + share · (branch(x) − x)`.

    Front follows, since it is linear in the branches; what is mixed into it is left as it is. So is a model without
    residual branches.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ResidualBranch):
                module.project.weight.mul_(share)
                module.project.bias.mul_(share)


class ResidualBranch(nn.Module):
    """`x + FC(Dropout(ReLU(BN(FC(SE(x))))))` on `[batch, D]`, the identity until it is trained."""

    def __init__(self, se: SEBlock, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.se = se
        self.expand = nn.Linear(se.channels, hidden_dim, bias=False)  # the BatchNorm behind it has the bias
        self.norm = nn.BatchNorm1d(hidden_dim)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(hidden_dim, se.channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch's version of x, same shape."""
        hidden: Tensor = self.dropout(self.activation(self.norm(self.expand(self.se(x)))))
        change: Tensor = self.project(hidden)
        return x + change


def _logit(alpha: float) -> Tensor:
    """Return the float32 logit whose sigmoid is nearest to alpha: the rounded logit or one of its neighbours."""
    wanted = torch.tensor(alpha, device="cpu")
    middle = torch.tensor(math.log(alpha / (1 - alpha)), device="cpu")
    around = torch.stack([middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1)])
    nearest: Tensor = around[(torch.sigmoid(around) - wanted).abs().argmin()]
    return nearest.clone()
