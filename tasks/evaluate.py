"""Evaluate: verification and identification figures of every mode beside the raw baseline.

Rows are taken from the features at one table version; subjects that a model has seen in training or validation are left
out wherever modes are compared, and their number is told. The definitions are those of `metrics`; what is done with the
figures is left to `tasks.gate` and `tasks.report`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metrics.allpairs import AllPairs, Cell, all_pairs
from metrics.bootstrap import CellIntervals, Interval, bootstrap, paired_bootstrap
from metrics.poses import POSE_CLASSES
from models.checkpoint import load
from schemas.errors import BadModelError, StoreError
from schemas.index import IndexSettings
from schemas.releases import ModelRef
from schemas.reports import (
    ALL,
    RAW,
    CellResult,
    Curve,
    Estimate,
    Evaluation,
    Histogram,
    ModeResult,
    PairsResult,
    Population,
)
from schemas.settings import EvaluationSettings
from storage.location import Location
from storage.tables import Snapshot
from tasks.identify import identify_mode
from tasks.index import Previous
from tasks.labelled import LabelledRows, labelled_rows, sample_subjects
from tasks.pairs import pairs_accuracy

log = logging.getLogger("frontalis.evaluate")

HELD_OUT = "held_out"


def evaluate(
    store_uri: str,
    release: str,
    features: Snapshot,
    models: Mapping[str, ModelRef],
    settings: EvaluationSettings,
    index: IndexSettings,
    served: Previous | None = None,
) -> Evaluation:
    """Measure every mode of a features snapshot; no population at all where fewer than two subjects are labelled.

    Args:
        store_uri: the store.
        release: name of the release, for the record.
        features: the files of the features table.
        models: mode → model, to know which subjects to leave out.
        settings: operating points, resamples, pairs file, limit on rows.
        index: how the identification index is built.
        served: the release that is served until now, to compare each mode with.

    Raises:
        SettingsError: the pairs file cannot be used.
        StoreError: a feature file or a model is missing or damaged; of the served release that is a note.
    """
    store = Location(store_uri)
    modes = [RAW, *sorted(models, reverse=True)]
    labelled, unlabelled = labelled_rows(store, features, modes, settings)
    seen, notes = _seen_by_models(store, labelled.names, models)
    held_out = labelled.take(~seen[labelled.subjects])
    measure = _Measure(settings, index, models, frozenset(labelled.ids))
    populations = {}
    if len(labelled.names) < 2:
        notes.append("fewer than two labelled subjects: nothing can be measured")
    else:
        populations[ALL] = measure.population(ALL, labelled, labelled, [RAW], {})
    if len(np.unique(held_out.subjects)) < 2:
        notes.append("fewer than two labelled subjects that no model has seen: modes cannot be compared")
    else:
        before = {}
        if served is not None:
            try:
                before = _served_features(store, served, held_out, modes, settings)
            except StoreError as error:
                notes.append(f"not compared with the served release {served.release.release}: {error}")
                log.warning("evaluation: %s", notes[-1])
        populations[HELD_OUT] = measure.population(HELD_OUT, labelled, held_out, modes, before)
    return Evaluation(
        release=release,
        resamples=settings.resamples,
        seed=settings.seed,
        fmrs=list(settings.fmrs),
        unlabelled_rows=unlabelled,
        duplicate_rows=len(labelled) - len(np.unique(labelled.duplicates)),
        notes=notes,
        populations=populations,
    )


Differences = dict[str, dict[str, Estimate]]
"""Cell → metric → difference."""


@dataclass(frozen=True)
class _Measure:
    """How populations are measured. `stored` are the ids of all labelled rows, for the pairs file."""

    settings: EvaluationSettings
    index: IndexSettings
    models: Mapping[str, ModelRef]
    stored: frozenset[str]

    def population(
        self,
        name: str,
        everybody: LabelledRows,
        rows: LabelledRows,
        modes: Sequence[str],
        served: Mapping[str, "_ServedFeatures"],
    ) -> Population:
        """Measure each mode over `rows`, or over a sample of their subjects where there are too many."""
        sample, sampled_from = sample_subjects(rows, self.settings.max_rows)
        swept = {mode: self._sweep(sample, sample.features[mode]) for mode in modes}
        results = {}
        for mode in modes:
            log.info("evaluation: %s, %s: %d rows", name, mode, len(sample))
            results[mode] = ModeResult(
                mode=mode,
                model_digest=self.models[mode].digest if mode in self.models else None,
                thresholds={
                    fmr: swept[mode].overall.verification.at(float(fmr)).threshold for fmr in self.settings.fmrs
                },
                cells=self._cells(swept[mode]),
                difference={} if mode == RAW else self._difference(swept[RAW], swept[mode]),
                versus_served=self._versus_served(sample, mode, served[mode]) if mode in served else {},
                versus_modes={
                    other: self._difference(swept[other], swept[mode])
                    for other in modes[: modes.index(mode)]
                    if other != RAW
                },
                pairs=self._pairs(sample, mode),
                identification=identify_mode(
                    sample.features[mode], sample.subjects, sample.classes, self.index, self.settings
                ),
            )
        return Population(
            name=name,
            n_rows=len(sample),
            n_subjects=len(np.unique(sample.subjects)),
            left_out_subjects=len(np.unique(everybody.subjects)) - len(np.unique(rows.subjects)),
            left_out_rows=len(everybody) - len(rows),
            sampled_from_subjects=sampled_from,
            modes=results,
        )

    def _sweep(self, rows: LabelledRows, features: np.ndarray) -> AllPairs:
        return all_pairs(
            features,
            rows.subjects,
            classes=rows.classes,
            class_names=POSE_CLASSES,
            duplicates=rows.duplicates,
            fmr_points=tuple(float(fmr) for fmr in self.settings.fmrs),
        )

    def _cells(self, pairs: AllPairs) -> dict[str, CellResult]:
        settings = self.settings
        intervals = bootstrap(pairs, resamples=settings.resamples, seed=settings.seed) if settings.resamples else {}
        return {cell.name: _cell(cell, intervals.get(cell.name), settings.fmrs) for cell in pairs}

    def _difference(self, base: AllPairs, other: AllPairs) -> Differences:
        resamples = self.settings.resamples
        paired = paired_bootstrap(base, other, resamples=max(1, resamples), seed=self.settings.seed)

        def estimate(interval: Interval | None) -> Estimate:
            if interval is None or interval.estimate is None:
                return Estimate(value=None, reason="not estimable")
            if not resamples:
                return Estimate(value=interval.estimate)
            return Estimate(value=interval.estimate, low=interval.low, high=interval.high)

        return {
            cell: {
                "eer": estimate(one.eer),
                "auc": estimate(one.auc),
                **{f"fnmr@{fmr}": estimate(one.fnmr_own.get(float(fmr))) for fmr in self.settings.fmrs},
                **{f"fnmr_global@{fmr}": estimate(one.fnmr_global.get(float(fmr))) for fmr in self.settings.fmrs},
            }
            for cell, one in paired.items()
        }

    def _versus_served(self, rows: LabelledRows, mode: str, served: "_ServedFeatures") -> Differences:
        """Compare over the rows that both releases have and none of their models has seen."""
        at = [row for row, name in enumerate(rows.ids) if name in served.rows]
        common = rows.take(np.array(at, np.int64))
        if len(np.unique(common.subjects)) < 2:
            return {}
        old = served.features[[served.rows[name] for name in common.ids]]
        return self._difference(self._sweep(common, old), self._sweep(common, common.features[mode]))

    def _pairs(self, rows: LabelledRows, mode: str) -> list[PairsResult]:
        path = self.settings.pairs
        return pairs_accuracy(rows, rows.features[mode], path, self.stored) if path else []


def _cell(cell: Cell, intervals: CellIntervals | None, fmrs: Sequence[str]) -> CellResult:
    result = cell.verification
    at_global = {point.target_fmr: point for point in cell.at_global}
    return CellResult(
        n_genuine=result.n_genuine,
        n_impostor=result.n_impostor,
        eer=_with_reason(result.eer.rate, result.eer.reason, intervals.eer if intervals else None),
        auc=_with_reason(
            result.auc, "not estimable: one kind of pair is missing", intervals.auc if intervals else None
        ),
        d_prime=result.d_prime,
        fnmr={
            fmr: _with_reason(
                result.at(float(fmr)).fnmr,
                result.at(float(fmr)).reason,
                intervals.fnmr_own.get(float(fmr)) if intervals else None,
            )
            for fmr in fmrs
        },
        fnmr_global={
            fmr: _with_reason(
                at_global[float(fmr)].fnmr,
                at_global[float(fmr)].reason,
                intervals.fnmr_global.get(float(fmr)) if intervals else None,
            )
            for fmr in fmrs
        },
        fmr_global={fmr: at_global[float(fmr)].fmr for fmr in fmrs},
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


def _with_reason(value: float | None, reason: str | None, interval: Interval | None) -> Estimate:
    if value is None:
        return Estimate(value=None, reason=reason or "not estimable")
    if interval is None:
        return Estimate(value=value)
    return Estimate(value=value, low=interval.low, high=interval.high)


def _seen_by_models(
    store: Location, names: Sequence[str], models: Mapping[str, ModelRef]
) -> tuple[np.ndarray, list[str]]:
    """Return whom any model was trained or chosen on, bool `[names]`, and notes on models that do not tell."""
    seen = np.zeros(len(names), bool)
    notes = []
    for mode, model in models.items():
        try:
            seen |= load((store / model.path).read_bytes()).has_seen(names)
        except FileNotFoundError as error:
            raise StoreError(f"{store.uri}/{model.path}: the model is missing.") from error
        except BadModelError as error:
            notes.append(f"mode {mode}: {error}; its figures may be flattered by leaks")
            log.warning("evaluation: %s", notes[-1])
    return seen, notes


@dataclass(frozen=True)
class _ServedFeatures:
    """Features of one mode as served until now: float32 `[N, D]`, and the row of each id."""

    features: np.ndarray
    rows: Mapping[str, int]


def _served_features(
    store: Location, served: Previous, held_out: LabelledRows, modes: Sequence[str], settings: EvaluationSettings
) -> dict[str, _ServedFeatures]:
    """Return, by mode, the served features of the held-out rows, less those of subjects the served models have seen."""
    there = {file.partitions["mode"] for file in served.features.files.values()}
    old_modes = [mode for mode in modes if mode != RAW and mode in there]
    if RAW not in there or not old_modes:
        return {}
    seen, _ = _seen_by_models(store, held_out.names, served.release.models)
    unseen = {name for name, subject in zip(held_out.ids, held_out.subjects, strict=True) if not seen[subject]}
    old, _ = labelled_rows(store, served.features, [RAW, *old_modes], settings)
    rows = {name: at for at, name in enumerate(old.ids) if name in unseen}
    return {mode: _ServedFeatures(old.features[mode], rows) for mode in old_modes}
