"""How far a trained network may go from raw: its change is made as long as subjects it has not seen can vouch for.

A network that learns from few subjects learns too long a change: on others it harms (docs/training.md). So its change
is scored at several lengths, on subjects it has not seen: those of validation where these are enough, else all that it
trains on, by cross-validation. Fewer subjects mean a larger standard error of the score, and a shorter change.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from metrics.allpairs import AllPairs, Cell
from metrics.bootstrap import draw, draw_subjects
from metrics.poses import FRONTAL, PROFILE
from models.dual_branch import scale_change, whitening_of
from models.se import SEBlock
from models.split import subject_key
from schemas.metrics import ALL, EER, FRONTAL_FRONTAL, FRONTAL_PROFILE, MetricId
from schemas.reports import Estimate
from tasks.training.rows import TrainingRows
from tasks.training.selection import (
    ERROR_RATES,
    HANDFUL,
    HARM_RATES,
    HARM_WEIGHT,
    compare_by_pose,
    front,
    scaled,
)

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
FEWEST = 30  # subjects that a claim is made on; fewer have no interval worth the name
DRAWS = 200  # the standard error of the score is then known to 5%
_FOLD_SALT = "folds of training"
Key = tuple[str, MetricId]
Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Unseen:
    """A model in eval mode, with rows of subjects it has not seen, as stored."""

    model: nn.Module
    rows: TrainingRows
    mean_norm: float


@dataclass(frozen=True)
class Length:
    """A length that was scored: the share of the learnt change, None for raw embeddings.

    `score` is the `score_of` the unseen subjects, lower is better and 0 is raw, `error` its standard error over
    subjects. `eer` is the relative change of the equal error rate in the cell that decides, with its 95% interval.
    """

    share: float | None
    score: float
    error: float
    eer: Estimate


@dataclass(frozen=True)
class Choice:
    """The length of smallest `score + error`, all that were scored, in which cell, on how many subjects."""

    best: Length
    scored: list[Length]
    cell: str
    subjects: int

    @property
    def improved(self) -> bool:
        """Whether the error rate is lower than raw's beyond its interval, on enough subjects to say so."""
        high = self.best.eer.high
        return self.best.share is not None and self.subjects >= FEWEST and high is not None and high < 0


def choose_length(unseen: Sequence[Unseen], seed: int) -> Choice:
    """Score a network's change at every length and return the choice.

    Each part has its own model, and its pairs their own thresholds; rates are averaged over the parts. Raw scores 0
    without an error, so that it is taken where nothing is better by a standard error. Of equal lengths the longest.
    """
    raw = [compare_by_pose(part.rows.x, _codes(part), part.rows.classes) for part in unseen]
    drawn = [draw_subjects(pairs, DRAWS, seed + number, 0.95) for number, pairs in enumerate(raw)]
    base = _rates(raw, drawn)
    cell = FRONTAL_PROFILE if (FRONTAL_PROFILE, EER) in base.values else ALL
    scored = []
    for share in lengths_of(unseen[0].model):
        pairs = [
            compare_by_pose(front(at_length(part.model, share), scaled(part.rows.x, part.mean_norm)), codes, classes)
            for part, codes, classes in ((part, _codes(part), part.rows.classes) for part in unseen)
        ]
        scored.append(_length(share, _rates(pairs, drawn), base, cell))
    scored.append(Length(None, 0.0, 0.0, Estimate(value=0.0, low=0.0, high=0.0)))
    best = min(scored, key=lambda one: one.score + one.error)
    return Choice(best, scored, cell, sum(len(deciding_subjects(part.rows)) for part in unseen))


def raw_choice() -> Choice:
    """Return the choice where nothing can be scored: raw, on no subject."""
    raw = Length(None, 0.0, 0.0, Estimate(value=0.0, low=0.0, high=0.0))
    return Choice(raw, [raw], ALL, 0)


def lengths_of(model: nn.Module) -> tuple[float, ...]:
    """Return the shares of its change that a model can be cut to; no change at all is one where whitening is left."""
    probe = copy.deepcopy(model)
    before = [weights.clone() for weights in probe.state_dict().values()]
    scale_change(probe, 0.0)
    if all(bool((a == b).all()) for a, b in zip(before, probe.state_dict().values(), strict=True)):
        return (1.0,)
    return SHARES if whitening_of(model) is not None else SHARES[:-1]


def at_length(model: nn.Module, share: float | None) -> nn.Module:
    """Return a copy of a model whose change is cut to a share of its own, None for one that gives raw directions."""
    shorter = copy.deepcopy(model)
    scale_change(shorter, 0.0 if share is None else share)
    if share is None:
        with torch.no_grad():
            if isinstance(shorter, SEBlock):  # equal weights leave a direction as it is
                for weights in shorter.parameters():
                    weights.zero_()
            if (mixed := whitening_of(shorter)) is not None:
                mixed.weight.zero_()
                mixed.offset.zero_()
    return shorter


def deciding_subjects(rows: TrainingRows) -> NDArray[np.object_]:
    """Return the subjects that have pairs in the deciding cell: those seen in both views, or those with two rows.

    The second where nobody was seen in both.
    """
    profile = rows.classes == PROFILE
    both = np.intersect1d(rows.subjects[profile], rows.subjects[rows.classes == FRONTAL])
    if len(both):
        return both
    names, each = np.unique(rows.subjects, return_counts=True)
    return np.asarray(names[each > 1])


def folds_of(rows: TrainingRows, wanted: int) -> list[NDArray[np.object_]]:
    """Return up to `wanted` lists of subjects, disjoint and about equal, each with two or more that have pairs.

    Fewer lists where there are too few such subjects, none where there are fewer than four. They depend on names only.
    """
    names = np.unique(rows.subjects)
    order = np.argsort([subject_key(name, _FOLD_SALT) for name in names], kind="stable")
    deciding = np.isin(names[order], deciding_subjects(rows))
    paired, others = names[order][deciding], names[order][~deciding]
    count = min(wanted, len(paired) // 2)
    if count < 2:
        return []
    return [np.concatenate([paired[fold::count], others[fold::count]]) for fold in range(count)]


@dataclass(frozen=True, eq=False)
class _Rates:
    """Rates averaged over the parts, `[1 + draws]` each, the exact one first; genuine pairs by cell."""

    values: Mapping[Key, Samples]
    genuine: Mapping[str, int]


def _rates(parts: Sequence[AllPairs], drawn: Sequence[Samples]) -> _Rates:
    """Average over the parts that have a rate."""
    found: dict[Key, list[Samples]] = {}
    genuine: dict[str, int] = {}
    for pairs, multiplicities in zip(parts, drawn, strict=True):
        resampled = draw(pairs, multiplicities)
        for cell in _deciding(pairs):
            exact = cell.estimates()
            genuine[cell.name] = genuine.get(cell.name, 0) + cell.verification.n_genuine
            for metric in ERROR_RATES:
                value = exact[metric].value
                if value is not None:
                    samples = np.concatenate([[value], resampled[cell.name][metric]])
                    found.setdefault((cell.name, metric), []).append(samples)
    return _Rates({key: np.mean(samples, axis=0) for key, samples in found.items()}, genuine)


def _deciding(pairs: AllPairs) -> Iterator[Cell]:
    yield pairs.overall
    for name in (FRONTAL_PROFILE, FRONTAL_FRONTAL):
        if name in pairs.cells:
            yield pairs.cells[name]


def _length(share: float, ours: _Rates, base: _Rates, cell: str) -> Length:
    def log_ratio(key: Key) -> Samples:
        few = HANDFUL / max(base.genuine[key[0]], 1)
        return np.asarray(np.log((ours.values[key] + few) / (base.values[key] + few)))

    gains = [log_ratio(key) for metric in ERROR_RATES if (key := (cell, metric)) in base.values and key in ours.values]
    harms = [
        np.maximum(log_ratio(key), 0)
        for metric in HARM_RATES
        if (key := (FRONTAL_FRONTAL, metric)) in base.values and key in ours.values
    ]
    if not gains:
        return Length(share, 0.0, float("inf"), Estimate(value=None, reason="no rate is estimable"))
    score = np.mean(gains, axis=0) + HARM_WEIGHT * np.sum(harms or [np.zeros(1)], axis=0)
    error = float(np.nanstd(score[1:]))
    return Length(share, float(score[0]), error, _relative(base.values.get((cell, EER)), ours.values.get((cell, EER))))


def _relative(before: Samples | None, after: Samples | None) -> Estimate:
    if before is None or after is None or before[0] <= 0:
        return Estimate(value=None, reason="not estimable")
    change = (after - before) / before[0]
    low, high = np.nanquantile(change[1:], [0.025, 0.975])
    return Estimate(value=float(change[0]), low=float(low), high=float(high))


def _codes(part: Unseen) -> NDArray[np.int64]:
    return np.unique(part.rows.subjects, return_inverse=True)[1]
