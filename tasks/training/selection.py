"""Model selection on held-out subjects: the score of a candidate against the raw embeddings.

The definitions are those of `metrics`. Which rows are scored, and when, is left to `tasks.training.train` and
`models.training`.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from metrics.allpairs import AllPairs, Cell, all_pairs
from models.inference import normalise
from schemas.metrics import EER, FRONTAL_FRONTAL, FRONTAL_PROFILE, POSE_CLASSES, MetricId
from tasks.training.rows import READ_ROWS, TrainingRows

FMR_POINTS = (1e-2, 1e-3)
ERROR_RATES = (EER, *(MetricId.at(kind, fmr) for kind in ("fnmr", "fnmr_global") for fmr in FMR_POINTS))
SCORED_ROWS = 20_000  # all pairs of these take a second; more would not choose better
# Frontal-frontal errors are rare, so on some fifty validation subjects the harm is five times as uncertain as the gain
# (standard errors of about 12% and 2.5%); with more weight its noise decides (docs/training.md).
HARM_WEIGHT = 0.25
HARM_RATES = (EER, MetricId("fnmr_global@1e-3"))  # of frontal-frontal pairs
HANDFUL = 5  # pairs added to both error counts, so that a handful of pairs decides nothing

Rates = dict[MetricId, float | None]


class ValidationScorer:
    """Scores models on the rows it is given, against the raw embeddings.

    `raw` holds the raw embeddings' result. `rates` holds, by score, the error rates of the cell that decides.
    """

    def __init__(self, rows: TrainingRows, mean_norm: float) -> None:
        _, self._codes = np.unique(rows.subjects, return_inverse=True)
        self._classes = rows.classes
        self._x = scaled(rows.x, mean_norm)
        self.raw = compare_by_pose(rows.x, self._codes, rows.classes)
        self.rates: dict[float, Rates] = {}

    def __call__(self, model: nn.Module) -> float:
        """Return the `validation_score` of a model."""
        pairs = compare_by_pose(front(model, self._x), self._codes, self._classes)
        score = validation_score(pairs, self.raw)
        self.rates[score] = error_rates(deciding_cells(pairs, self.raw)[0])
        return score

    @property
    def raw_cell(self) -> Cell:
        """The cell that decides, of the raw embeddings."""
        return deciding_cells(self.raw, self.raw)[1]


def validation_score(pairs: AllPairs, raw: AllPairs) -> float:
    """Return what model selection minimises: the gain plus a quarter of the harm. Raw scores 0, lower is better.

    With r(m) the log ratio of the model's error rate m to raw's:

        gain  = mean of r over `ERROR_RATES` of frontal–profile pairs
        harm  = Σ max(0, r) over EER and FNMR at global FMR 1e-3 of frontal–frontal pairs
        score = gain + harm / 4

    One rate alone is a poor guide: the EER keeps falling long after FNMR at low FMR has begun to rise. Without
    frontal–profile pairs the gain is over all pairs. Rates that are not estimable on these subjects are skipped.
    """
    cell, base = deciding_cells(pairs, raw)
    gains = _log_ratios(cell, base, ERROR_RATES)
    harms = []
    if FRONTAL_FRONTAL in raw.cells:
        frontal, raw_frontal = pairs.cells[FRONTAL_FRONTAL], raw.cells[FRONTAL_FRONTAL]
        harms = _log_ratios(frontal, raw_frontal, HARM_RATES)
    return sum(gains) / max(len(gains), 1) + HARM_WEIGHT * sum(max(0.0, harm) for harm in harms)


def deciding_cells(pairs: AllPairs, raw: AllPairs) -> tuple[Cell, Cell]:
    """Return the cell in which a model should gain, of both: frontal–profile pairs, or all pairs without such."""
    cell, base = pairs.cells.get(FRONTAL_PROFILE), raw.cells.get(FRONTAL_PROFILE)
    if cell is None or base is None or base.verification.eer.value is None:
        return pairs.overall, raw.overall
    return cell, base


def error_rates(cell: Cell) -> Rates:
    """Return `ERROR_RATES` of a cell, None for what is not estimable."""
    found = cell.estimates()
    return {metric: found[metric].value for metric in ERROR_RATES}


def compare_by_pose(x: np.ndarray, subjects: np.ndarray, classes: np.ndarray) -> AllPairs:
    """Compare all rows by pose pair, at the false match rates that training looks at."""
    return all_pairs(x, subjects, classes=classes, class_names=POSE_CLASSES, fmr_points=FMR_POINTS)


def front(model: nn.Module, x: Tensor) -> np.ndarray:
    """Return the front branch of a model in eval mode for scaled rows, float32 `[N, D]`."""
    with torch.inference_mode():
        return np.concatenate([model(block).numpy() for block in torch.split(x, READ_ROWS)])


def scaled(x: np.ndarray, mean_norm: float) -> Tensor:
    """Return rows scaled as networks of `train` want them, see `models.inference.normalise`."""
    return normalise(torch.from_numpy(x), "mean_norm", mean_norm)


def _log_ratios(cell: Cell, base: Cell, metrics: Sequence[MetricId]) -> list[float]:
    new, old = error_rates(cell), error_rates(base)
    few = HANDFUL / max(base.verification.n_genuine, 1)
    both = [(new[metric], old[metric]) for metric in metrics]
    return [math.log((a + few) / (b + few)) for a, b in both if a is not None and b is not None]
