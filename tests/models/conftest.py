"""Networks that were really trained a little, so BatchNorm statistics, α and weights are far from their start."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from models.dual_branch import DualBranchEnsemble, DualBranchSENet, whitening_of
from models.se import SEBlock, gather_statistics

Trained = Callable[..., nn.Module]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained() -> Trained:
    """`trained(dim, use_batch_stat, gather=True, **arguments)` gives a dual-branch network after a few random steps."""
    return _trained


def _trained(
    dim: int, use_batch_stat: bool, *, architecture: str = "dual_branch", gather: bool = True, **arguments: object
) -> nn.Module:
    torch.manual_seed(dim)
    if architecture == "se":
        model: nn.Module = SEBlock(dim, use_batch_stat=use_batch_stat, **arguments)  # type: ignore[arg-type]
    elif architecture == "dual_branch_ensemble":
        model = DualBranchEnsemble(feature_dim=dim, use_batch_stat=use_batch_stat, **arguments)  # type: ignore[arg-type]
    else:
        model = DualBranchSENet(dim, use_batch_stat=use_batch_stat, **arguments)  # type: ignore[arg-type]
    rows = torch.randn(256, dim) * 2 + torch.randn(dim)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(6):
        optimiser.zero_grad()
        batch = rows[torch.randint(len(rows), (64,))]
        (model(batch) - torch.roll(batch, 1, dims=1)).square().mean().backward()
        optimiser.step()
    whitening = whitening_of(model)
    if whitening is not None:
        whitening.solve(rows, torch.arange(len(rows)) // 4, torch.arange(len(rows)) % 4 > 2, 0.5)
    if gather:
        gather_statistics(model, rows.split(50))
    return model.eval()
