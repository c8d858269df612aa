"""Within-class covariance normalisation (WCCN), the linear map that a network's output is mixed with.

It is solved for, not learnt, and needs no pose at inference. By itself it helps less than a network, but errs on other
pairs (docs/training.md).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_BLOCK = 16_384


class Whitening(nn.Module):
    """Mixes the whitened direction of x into a network's output; without effect until `solve` was called.

    With W and c from `within_class_map`, and s the strength:

        y = W (x / |x| − c)
        front + s · |front| · y / |y|

    Args:
        dim: D.
        strength: s, how long the whitened part is, the network's output being 1.
    """

    weight: Tensor  # [D, D]
    offset: Tensor  # [D]: W c

    def __init__(self, dim: int, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.register_buffer("weight", torch.zeros(dim, dim))
        self.register_buffer("offset", torch.zeros(dim))

    def solve(self, x: Tensor, subjects: Tensor, profile: Tensor, shrinkage: float) -> None:
        """Set the map to that of these rows, see `within_class_map`."""
        weight, centre = within_class_map(x, subjects, profile, shrinkage)
        self.weight.copy_(weight)
        self.offset.copy_(weight @ centre)

    def forward(self, front: Tensor, x: Tensor) -> Tensor:
        """Return the mixture, `[n, D]`, of the network's output for the rows x, both `[n, D]`."""
        return self.mix(front, x, x @ self.weight.T)

    def mix(self, front: Tensor, x: Tensor, product: Tensor) -> Tensor:
        """Return the mixture where `x @ weight.T` is known."""
        y = product - torch.linalg.vector_norm(x, dim=1, keepdim=True) * self.offset
        length = self.strength * torch.linalg.vector_norm(front, dim=1, keepdim=True)
        mixed: Tensor = front + length * functional.normalize(y, dim=1)
        return mixed


def within_class_map(x: Tensor, subjects: Tensor, profile: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Return W `[D, D]`, symmetric, and the centre c `[D]`, float64: WCCN (Hatch et al. 2006) with shrinkage.

    Over rows of unit length, with C(s, v) the covariance of the rows of subject s in view v, and d(s) the difference of
    the means of their two views:

        within = mean over s of [C(s, other) + C(s, profile) + d(s) d(s)ᵀ] / 2
        W = (within / mean variance of its channels + shrinkage · I)^(−1/2)

    c is the mean of the two views' means. Only subjects seen in both views count. Where fewer than two are, views are
    not distinguished: `within` is the mean covariance of the subjects with several rows, and c the mean. W is the
    identity where no subject has several rows, or none of them varies.

    Args:
        x: `[N, D]`, no row of zeros.
        subjects: int64 codes `[N]`, from 0.
        profile: bool `[N]`.
        shrinkage: above 0; the larger, the nearer is W to a multiple of the identity.
    """
    view = profile.long()
    seen = torch.bincount(2 * subjects + view, minlength=2 * (int(subjects.max()) + 1)).reshape(-1, 2)
    both = (seen > 0).all(dim=1)
    if int(both.sum()) < 2:
        view, both = torch.zeros_like(view), seen.sum(dim=1) > 1
    dim = x.shape[1]
    sums = torch.zeros(2, dim, dtype=torch.float64)
    for rows, of in zip(torch.split(x, _BLOCK), torch.split(view, _BLOCK), strict=True):
        sums.index_add_(0, of, _unit(rows))
    views = torch.bincount(view, minlength=2)
    centre = (sums[views > 0] / views[views > 0, None]).mean(dim=0)
    number = int(both.sum())
    if number == 0:
        return torch.eye(dim, dtype=torch.float64), centre
    within = _scatter(x, subjects, view, both) / (number * int((views > 0).sum()))
    variance = float(within.trace()) / dim
    if variance <= 0:
        return torch.eye(dim, dtype=torch.float64), centre
    values, vectors = torch.linalg.eigh(within / variance)
    return (vectors * (values.clamp_min(0) + shrinkage) ** -0.5) @ vectors.T, centre


def _scatter(x: Tensor, subjects: Tensor, view: Tensor, counted: Tensor) -> Tensor:
    """Return the sum over the counted subjects of the covariances of their views, and of `d dᵀ` where there are two."""
    number = torch.cumsum(counted, 0) - 1
    rows = torch.nonzero(counted[subjects]).flatten()
    group = 2 * number[subjects[rows]] + view[rows]
    groups = 2 * int(counted.sum())
    sizes = torch.bincount(group, minlength=groups)
    means = torch.zeros(groups, x.shape[1], dtype=torch.float64)
    for at, of in zip(torch.split(rows, _BLOCK), torch.split(group, _BLOCK), strict=True):
        means.index_add_(0, of, _unit(x[at]))
    means /= sizes.clamp_min(1)[:, None]
    across = (means[0::2] - means[1::2])[(sizes[0::2] > 0) & (sizes[1::2] > 0)]
    total = across.T @ across
    for at, of in zip(torch.split(rows, _BLOCK), torch.split(group, _BLOCK), strict=True):
        apart = (_unit(x[at]) - means[of]) / sizes[of, None].sqrt()
        total += apart.T @ apart
    return total


def _unit(x: Tensor) -> Tensor:
    return functional.normalize(x.double(), dim=1)
