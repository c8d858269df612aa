"""Channel weights of a network, and how well they follow the channels that distinguish people.

Numbers only: plots and reading data are left to `tasks.explain`.
"""

import copy
import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.dual_branch import DualBranchEnsemble, DualBranchSENet, members_of
from models.se import SEBlock

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class ChannelSummary:
    """Mean and spread (population standard deviation) of each channel's weight over samples, float64 `[C]` each."""

    mean: NDArray[np.float64]
    spread: NDArray[np.float64]


def member_weights(model: nn.Module, x: Tensor) -> dict[str, NDArray[np.float32]]:
    """Return the channel weights of each branch of each member for rows `[n, C]`, scaled as the card says.

    The keys are `identity` and `pose`, or `se` for a plain block. Each value is `[members, n, C]`; a network that is no
    ensemble is its only member. Under a batch statistic the weights of all rows are equal. The model stays in its mode
    (train or eval). Raises TypeError for another kind of model.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return {
                name: np.stack([block.weights(x).expand(len(x), -1).cpu().numpy() for block in same])
                for name, same in _blocks(model).items()
            }
    finally:
        model.train(was_training)


def with_one_weight(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy of the model in which each SE block weights all channels alike: by its mean weight over rows x."""

    def alike(block: SEBlock) -> Callable[[Tensor], Tensor]:
        mean = block.weights(x).mean()
        return lambda rows: rows * mean

    return _with_weights(model, alike)


def with_shuffled_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a copy of the model in which each SE block gives its weights to other channels, by a fixed permutation."""
    draw = torch.Generator().manual_seed(seed)

    def shuffled(block: SEBlock) -> Callable[[Tensor], Tensor]:
        order = torch.randperm(block.channels, generator=draw)
        return lambda rows: rows * block.weights(rows)[:, order]

    return _with_weights(model, shuffled)


class _Weighting(nn.Module):
    """Stands in for an SE block."""

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weigh = weigh

    def forward(self, x: Tensor) -> Tensor:
        return self.weigh(x)


def _with_weights(model: nn.Module, weighing: Callable[[SEBlock], Callable[[Tensor], Tensor]]) -> nn.Module:
    changed = copy.deepcopy(model).eval()
    with torch.no_grad():
        if isinstance(changed, SEBlock):
            return _Weighting(weighing(changed))
        for module in list(changed.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, SEBlock):
                    setattr(module, name, _Weighting(weighing(child)))
    return changed


def agreement(members: Floats) -> float | None:
    """Return how alike members rank the channels: the mean `rank_correlation` of their mean weights, over all pairs.

    Near 1, the ranking is a finding about the data. Near 0, each training ranks them differently. `members` is
    `[members, n, C]`. None for a single member, or where a member weights all channels equally.
    """
    means = members.mean(axis=1, dtype=np.float64)
    found = [rank_correlation(a, b) for a, b in itertools.combinations(means, 2)]
    known = [one for one in found if one is not None]
    return float(np.mean(known)) if known and len(known) == len(found) else None


def _blocks(model: nn.Module) -> dict[str, list[SEBlock]]:
    if isinstance(model, SEBlock):
        return {"se": [model]}
    if not isinstance(model, DualBranchSENet | DualBranchEnsemble):
        raise TypeError(f"{type(model).__name__} has no channel weights known to models.explain; extend it there")
    members = [member for member in members_of(model) if isinstance(member, DualBranchSENet)]
    return {
        "identity": [member.identity_branch.se for member in members],
        "pose": [member.pose_branch.se for member in members],
    }


def summarise(weights: Floats) -> ChannelSummary:
    """Return mean and spread over the samples of weights `[n, C]`; `ValueError` for no sample."""
    if weights.ndim != 2 or len(weights) == 0:
        raise ValueError(f"weights must be [n, C] with n > 0, not {list(weights.shape)}")
    return ChannelSummary(weights.mean(axis=0, dtype=np.float64), weights.std(axis=0, dtype=np.float64))


def top_channels(weights: Floats, k: int = 10) -> list[tuple[int, float]]:
    """Return the k channels of largest weight as (channel, weight), largest first; of equal ones the lower channel.

    `weights` is `[C]`: of one sample, or a mean. All C are returned when k is larger.
    """
    order = np.argsort(-weights, kind="stable")[:k]
    return [(int(channel), float(weights[channel])) for channel in order]


def identity_relatedness(x: Floats, subjects: Sequence[Hashable], views: Sequence[Hashable]) -> NDArray[np.float64]:
    """Return, for each channel, how much more it varies between subjects than within a subject across views.

    With m(s, v) the mean of the rows of subject s in view v, V(s) the number of views of s, m(s) the mean of its
    m(s, v), and m the mean of the m(s), each taken per channel:

        between = Σ_s (m(s) − m)² / (S − 1)
        within  = Σ_s [ Σ_v (m(s, v) − m(s))² / (V(s) − 1) ] / S
        relatedness = between / within

    It is the F ratio of a one-way analysis of variance over view means, up to the number of views: large where a
    channel distinguishes people whatever the view. Views and subjects count equally however
    many rows they have. Only the S subjects with at least two views count.

    Args:
        x: `[n, C]`.
        subjects: n names.
        views: n names of views, such as `frontal` and `profile`.

    Returns float64 `[C]`: infinity where a channel varies only between subjects, NaN where it does not vary at all.
    Raises `ValueError` for lengths that differ or fewer than two subjects that were seen in two views.
    """
    if not len(x) == len(subjects) == len(views):
        raise ValueError(f"{len(x)} rows, {len(subjects)} subjects and {len(views)} views; one of each a row is wanted")
    rows_of: dict[Hashable, dict[Hashable, list[int]]] = {}
    for row, (subject, view) in enumerate(zip(subjects, views, strict=True)):
        rows_of.setdefault(subject, {}).setdefault(view, []).append(row)
    centres, withins = [], []
    for rows_by_view in rows_of.values():
        if len(rows_by_view) >= 2:
            means = np.stack([x[rows].mean(axis=0, dtype=np.float64) for rows in rows_by_view.values()])
            centres.append(means.mean(axis=0))
            withins.append(means.var(axis=0, ddof=1))
    if len(centres) < 2:
        raise ValueError(f"{len(centres)} subjects were seen in two views; at least two are needed")
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.var(centres, axis=0, ddof=1) / np.mean(withins, axis=0))


def rank_correlation(a: Floats, b: Floats) -> float | None:
    """Return Spearman's rank correlation of two `[n]` arrays, ties given their mean rank; None where one is constant.

    Infinity ranks above all numbers. Pairs with a NaN are skipped. Raises ValueError for lengths that differ.

    >>> rank_correlation(np.array([1.0, 2.0, np.inf]), np.array([0.1, 0.2, 0.3]))
    1.0
    """
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"two arrays of one length are wanted, not {list(a.shape)} and {list(b.shape)}")
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    if len(np.unique(a)) < 2 or len(np.unique(b)) < 2:
        return None
    from scipy.stats import spearmanr  # loaded for this only

    return float(spearmanr(a, b).statistic)
