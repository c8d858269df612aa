"""Verification over a set of rows, as records: each cell with its intervals, and paired differences.

The definitions are those of `metrics`. Which rows are compared is left to `tasks.evaluate`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from metrics.allpairs import AllPairs, Cell, all_pairs
from metrics.bootstrap import bootstrap, paired_bootstrap, relative_bootstrap
from models.inference import torch_device
from schemas.features import digest_of
from schemas.metrics import AUC, EER, POSE_CLASSES, MetricId
from schemas.reports import CellResult, Curve, Differences, Estimate, Histogram
from schemas.settings import EvaluationSettings
from tasks.evaluation.rows import LabelledRows


@dataclass(frozen=True)
class Verifier:
    """Verifies rows with the operating points, resamples and device of the settings."""

    settings: EvaluationSettings
    kept: dict[str, AllPairs] = field(default_factory=dict)

    def compare(self, rows: LabelledRows, features: np.ndarray, *, keep: bool = False) -> AllPairs:
        """Compare all pairs of rows by pose, with their features float32 `[N, D]` in one mode.

        Equal input that was compared with `keep` is not compared again: two populations may hold the same rows, and
        most features equal the served ones.
        """
        parts = (features, rows.subjects, rows.classes, rows.duplicates)
        key = digest_of(*(np.ascontiguousarray(part).tobytes() for part in parts))
        pairs = self.kept.get(key) or all_pairs(
            features,
            rows.subjects,
            classes=rows.classes,
            class_names=POSE_CLASSES,
            duplicates=rows.duplicates,
            fmr_points=tuple(float(fmr) for fmr in self.settings.fmrs),
            device=torch_device(self.settings.device),
        )
        if keep:
            self.kept[key] = pairs
        return pairs

    def thresholds(self, pairs: AllPairs) -> dict[str, float | None]:
        """Return the threshold of all pairs together at each FMR."""
        return {fmr: pairs.overall.verification.at(float(fmr)).threshold for fmr in self.settings.fmrs}

    def cells(self, pairs: AllPairs) -> dict[str, CellResult]:
        """Return the record of every cell, with intervals unless the settings ask for no resamples."""
        settings = self.settings
        if not settings.resamples:
            return {cell.name: _cell_result(cell, cell.estimates(), settings.fmrs) for cell in pairs}
        estimates = bootstrap(pairs, resamples=settings.resamples, seed=settings.seed)
        return {cell.name: _cell_result(cell, estimates[cell.name], settings.fmrs) for cell in pairs}

    def differences(self, base: AllPairs, other: AllPairs) -> Differences:
        """Return `other` - `base` of the error rates and of AUC, paired over the same rows."""
        return self._paired(paired_bootstrap, base, other)

    def relative_differences(self, base: AllPairs, other: AllPairs) -> Differences:
        """Return the same as shares of `base`."""
        return self._paired(relative_bootstrap, base, other)

    def _paired(
        self, compare: Callable[..., Mapping[str, Mapping[MetricId, Estimate]]], base: AllPairs, other: AllPairs
    ) -> Differences:
        resamples = self.settings.resamples
        paired = compare(base, other, resamples=max(1, resamples), seed=self.settings.seed)
        shown = [EER, AUC, *(MetricId.at(kind, fmr) for kind in ("fnmr", "fnmr_global") for fmr in self.settings.fmrs)]
        return {
            cell: {
                metric: found[metric] if resamples else found[metric].model_copy(update={"low": None, "high": None})
                for metric in shown
            }
            for cell, found in paired.items()
        }


def _cell_result(cell: Cell, estimates: Mapping[MetricId, Estimate], fmrs: Sequence[str]) -> CellResult:
    return CellResult(
        n_genuine=cell.verification.n_genuine,
        n_impostor=cell.verification.n_impostor,
        eer=estimates[EER],
        auc=estimates[AUC],
        d_prime=cell.verification.d_prime,
        fnmr={fmr: estimates[MetricId.at("fnmr", fmr)] for fmr in fmrs},
        fnmr_global={fmr: estimates[MetricId.at("fnmr_global", fmr)] for fmr in fmrs},
        fmr_global={fmr: estimates[MetricId.at("fmr_global", fmr)].value for fmr in fmrs},
        det=Curve(fmr=cell.det.fmr[::-1].tolist(), fnmr=cell.det.fnmr[::-1].tolist()),
        histogram=Histogram(
            edges=cell.histogram.edges.tolist(),
            genuine=_density(cell.histogram.genuine, cell.histogram.edges),
            impostor=_density(cell.histogram.impostor, cell.histogram.edges),
        ),
    )


def _density(counts: np.ndarray, edges: np.ndarray) -> list[float]:
    """Return counts as a density, so that few genuine and many impostor scores can be compared."""
    total = int(counts.sum())
    return (counts / (total * np.diff(edges)) if total else np.zeros(len(counts))).tolist()
