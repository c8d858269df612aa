"""Losses for metric learning, called as `loss(features, labels)`. The loop and its recipe are in `models.training`.

The default, `global_threshold`, is our own. The others come from pytorch-metric-learning, which the extra `losses`
installs.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from schemas.errors import SettingsError


class BatchHardTriplet(nn.Module):
    """Triplet margin loss on cosine similarity, one triplet a row: its hardest positive and its hardest negative.

    `max(0, s(a, n) − s(a, p) + margin)`, averaged over the triplets that are not 0 (Hermans et al. 2017,
    arXiv:1703.07737).
    """

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        if not 0 < margin <= 2:
            raise SettingsError(f"margin is {margin}; cosine similarities differ by at most 2, choose one in (0, 2]")
        distances, losses, miners = _metric_learning("distances", "losses", "miners")
        self.miner = miners.BatchHardMiner(distance=distances.CosineSimilarity())
        self.loss = losses.TripletMarginLoss(margin=margin, distance=distances.CosineSimilarity())

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of `[n, D]` features with int64 labels `[n]`; 0 when no triplet can be formed."""
        loss: Tensor = self.loss(features, labels, self.miner(features, labels))
        return loss


class SupervisedContrastive(nn.Module):
    """Supervised contrastive loss on cosine similarity (Khosla et al. 2020, arXiv:2004.11362, the L_out form).

    The default temperature is low because higher ones harm the low-FMR end, measured on CFP embeddings.
    """

    def __init__(self, temperature: float = 0.03) -> None:
        super().__init__()
        if not temperature > 0:
            raise SettingsError(f"temperature is {temperature}; choose a value above 0, such as 0.03")
        distances, losses = _metric_learning("distances", "losses")
        self.loss = losses.SupConLoss(temperature=temperature, distance=distances.CosineSimilarity())

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of `[n, D]` features with int64 labels `[n]`; 0 when no row has a positive."""
        loss: Tensor = self.loss(features, labels)
        return loss


def _metric_learning(*modules: str) -> tuple[Any, ...]:
    try:
        return tuple(importlib.import_module(f"pytorch_metric_learning.{name}") for name in modules)
    except ModuleNotFoundError as error:
        raise SettingsError(
            "the losses supcon and triplet need pytorch-metric-learning; install the extra 'losses' (pip install "
            "'.[losses]'), or use global_threshold"
        ) from error


class GlobalThresholdLoss(nn.Module):
    """Push every genuine pair above one threshold, which all impostor pairs of the batch set together.

    With s the cosine similarity over the temperature, and N impostor pairs:

        threshold = log Σ exp(s) over the impostor pairs − log(fmr · N)
        loss = mean over the genuine pairs of softplus(threshold − s)

    The threshold is soft, for a false match rate of about `fmr`. Features are used with one threshold for all rows;
    losses that compare within a row (triplet, contrastive) allow each row its own. Measured against those in
    docs/training.md.
    """

    def __init__(self, temperature: float = 0.03, fmr: float = 2e-3) -> None:
        super().__init__()
        if not temperature > 0:
            raise SettingsError(f"temperature is {temperature}; choose a value above 0, such as 0.03")
        if not 0 < fmr < 1:
            raise SettingsError(f"fmr is {fmr}; choose a rate between 0 and 1, such as 2e-3")
        self.temperature = temperature
        self.fmr = fmr

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of `[n, D]` features with int64 labels `[n]`; 0 without a pair of either kind."""
        unit = functional.normalize(features)
        first, second = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
        scores = (unit @ unit.T)[first, second] / self.temperature
        genuine = labels[first] == labels[second]
        impostor_scores, genuine_scores = scores[~genuine], scores[genuine]
        if len(impostor_scores) == 0 or len(genuine_scores) == 0:
            return features.sum() * 0
        threshold = torch.logsumexp(impostor_scores, dim=0) - math.log(self.fmr * len(impostor_scores))
        return functional.softplus(threshold - genuine_scores).mean()


LOSSES: Mapping[str, Callable[..., nn.Module]] = {
    "global_threshold": GlobalThresholdLoss,
    "supcon": SupervisedContrastive,
    "triplet": BatchHardTriplet,
}


def make_loss(name: str, **options: float) -> nn.Module:
    """Return the loss of that name, called as `loss(features, labels)`; `SettingsError` for a wrong name or option."""
    if name not in LOSSES:
        raise SettingsError(f"loss {name!r} is unknown; known are {', '.join(sorted(LOSSES))}")
    try:
        return LOSSES[name](**options)
    except TypeError as error:
        raise SettingsError(f"loss {name!r}: {error}; see its description in models.losses") from error
