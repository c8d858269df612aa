"""Evaluate: verification and identification figures of every mode beside the raw baseline.

Rows are taken from the features at one table version; subjects that a model has seen in training or validation are left
out wherever modes are compared, and their number is told. The definitions are those of `metrics`; what is done with the
figures is left to `tasks.gate` and `reports.html`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from metrics.allpairs import AllPairs, Cell, all_pairs
from metrics.bootstrap import bootstrap, paired_bootstrap
from models.checkpoint import load
from models.inference import torch_device
from schemas.errors import BadModelError, StoreError
from schemas.features import digest_of
from schemas.index import IndexSettings
from schemas.metrics import ALL, AUC, EER, HELD_OUT, POSE_CLASSES, RAW, MetricId, measured_modes
from schemas.releases import ModelRef
from schemas.reports import (
    CellResult,
    Curve,
    Differences,
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
from tasks.evaluation.identification import identify_mode
from tasks.evaluation.pairs import Pairs, pairs_accuracy, read_pairs
from tasks.evaluation.rows import LabelledRows, Roster, read_labelled, read_roster, sample_subjects, stored_ids
from tasks.evaluation.served import served_features
from tasks.index import Previous

log = logging.getLogger("frontalis.evaluate")


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
    pairs = read_pairs(settings.pairs) if settings.pairs else None
    store = Location(store_uri)
    modes = measured_modes(models)
    roster = read_roster(store, features)
    seen, untold = _seen_by_models(store, roster.names, models)
    notes = [f"mode {mode}: {why}; its figures may be flattered by leaks" for mode, why in untold.items()]
    for note in notes:
        log.warning("evaluation: %s", note)
    stored = stored_ids(store, features) if settings.pairs else frozenset[str]()
    measure = _Measure(store, features, roster, settings, index, models, pairs, frozenset(untold), stored)
    everybody = measure.sample(np.arange(len(roster)), [RAW])
    held_out = np.flatnonzero(~seen[roster.subjects])
    populations, served_unread = {}, None
    if len(roster.names) < 2:
        notes.append("fewer than two labelled subjects: nothing can be measured")
    else:
        populations[ALL] = measure.population(ALL, everybody, [RAW], {})
    if len(np.unique(roster.subjects[held_out])) < 2:
        notes.append("fewer than two labelled subjects that no model has seen: modes cannot be compared")
    else:
        chosen = measure.sample(held_out, modes)
        before: dict[str, Differences] = {}
        if served is not None:
            try:
                before = measure.versus_served(chosen, modes, served)
            except StoreError as error:
                served_unread = str(error).partition("; run ")[0].rstrip(".")
                notes.append(f"not compared with the served release {served.release.release}: {served_unread}")
                log.warning("evaluation: %s", notes[-1])
        populations[HELD_OUT] = measure.population(HELD_OUT, chosen, modes, before)
    return Evaluation(
        release=release,
        resamples=settings.resamples,
        seed=settings.seed,
        fmrs=list(settings.fmrs),
        unlabelled_rows=roster.unlabelled,
        duplicate_rows=len(everybody.rows) - len(np.unique(everybody.rows.duplicates)),
        notes=notes,
        served_unread=served_unread,
        populations=populations,
    )


@dataclass(frozen=True)
class _Sample:
    """The rows that are measured of those that could be; `at` is where they are in the roster."""

    of: np.ndarray
    at: np.ndarray
    rows: LabelledRows
    sampled_from: int | None


@dataclass(frozen=True)
class _Measure:
    """How populations are measured.

    `untold` are the modes whose models do not tell whom they have seen, `stored` the ids of all rows, for the pairs
    file.
    """

    store: Location
    snapshot: Snapshot
    roster: Roster
    settings: EvaluationSettings
    index: IndexSettings
    models: Mapping[str, ModelRef]
    pairs: Pairs | None
    untold: frozenset[str]
    stored: frozenset[str]
    swept: dict[str, AllPairs] = field(default_factory=dict)

    def sample(self, rows: np.ndarray, modes: Sequence[str]) -> _Sample:
        """Read rows of the roster in each mode, or a sample of their subjects where there are too many."""
        at, sampled_from = sample_subjects(self.roster, rows, self.settings.max_rows)
        read = read_labelled(self.store, self.snapshot, self.roster, at, modes, self.settings)
        return _Sample(rows, at, read, sampled_from)

    def population(
        self, name: str, chosen: _Sample, modes: Sequence[str], before: Mapping[str, Differences]
    ) -> Population:
        """Measure each mode over a sample; `before` are the modes' differences to the served release."""
        sample, subjects = chosen.rows, self.roster.subjects
        swept = {mode: self._sweep(sample, sample.features[mode], keep=True) for mode in modes}
        results = {}
        for mode in modes:
            log.info("evaluation: %s, %s: %d rows", name, mode, len(sample))
            results[mode] = ModeResult(
                mode=mode,
                model_digest=self.models[mode].digest if mode in self.models else None,
                training_subjects_known=mode not in self.untold,
                thresholds={
                    fmr: swept[mode].overall.verification.at(float(fmr)).threshold for fmr in self.settings.fmrs
                },
                cells=self._cells(swept[mode]),
                difference={} if mode == RAW else self._difference(swept[RAW], swept[mode]),
                versus_served=before.get(mode, {}),
                versus_modes={
                    other: self._difference(swept[other], swept[mode])
                    for other in modes[: modes.index(mode)]
                    if other != RAW
                },
                pairs=self._pairs(sample, mode),
                identification=identify_mode(
                    sample.features[mode], sample.subjects, sample.classes, sample.duplicates, self.index, self.settings
                ),
            )
        return Population(
            name=name,
            n_rows=len(sample),
            n_subjects=len(np.unique(sample.subjects)),
            left_out_subjects=len(self.roster.names) - len(np.unique(subjects[chosen.of])),
            left_out_rows=len(self.roster) - len(chosen.of),
            sampled_from_subjects=chosen.sampled_from,
            modes=results,
        )

    def _sweep(self, rows: LabelledRows, features: np.ndarray, keep: bool = False) -> AllPairs:
        """Sweep, unless equal rows were swept and kept: two populations may be one, and most features are as served."""
        parts = (features, rows.subjects, rows.classes, rows.duplicates)
        key = digest_of(*(np.ascontiguousarray(part).tobytes() for part in parts))
        swept = self.swept.get(key) or all_pairs(
            features,
            rows.subjects,
            classes=rows.classes,
            class_names=POSE_CLASSES,
            duplicates=rows.duplicates,
            fmr_points=tuple(float(fmr) for fmr in self.settings.fmrs),
            device=torch_device(self.settings.device),
        )
        if keep:
            self.swept[key] = swept
        return swept

    def _cells(self, pairs: AllPairs) -> dict[str, CellResult]:
        settings = self.settings
        if not settings.resamples:
            return {cell.name: _cell(cell, cell.estimates(), settings.fmrs) for cell in pairs}
        estimates = bootstrap(pairs, resamples=settings.resamples, seed=settings.seed)
        return {cell.name: _cell(cell, estimates[cell.name], settings.fmrs) for cell in pairs}

    def _difference(self, base: AllPairs, other: AllPairs) -> Differences:
        resamples = self.settings.resamples
        paired = paired_bootstrap(base, other, resamples=max(1, resamples), seed=self.settings.seed)
        shown = [EER, AUC, *(MetricId.at(kind, fmr) for kind in ("fnmr", "fnmr_global") for fmr in self.settings.fmrs)]
        return {
            cell: {
                metric: found[metric] if resamples else found[metric].model_copy(update={"low": None, "high": None})
                for metric in shown
            }
            for cell, found in paired.items()
        }

    def versus_served(self, chosen: _Sample, modes: Sequence[str], served: Previous) -> dict[str, Differences]:
        """Compare, by mode, over the rows that both releases have and none of their models has seen.

        A mode whose served model does not tell whom it has seen has no comparison.
        """
        there = {file.mode for file in served.features.files.values()}
        seen, untold = _seen_by_models(self.store, chosen.rows.names, served.release.models)
        old_modes = [mode for mode in modes if mode != RAW and mode in there and mode not in untold]
        if RAW not in there or not old_modes:
            return {}
        unseen = np.flatnonzero(~seen[chosen.rows.subjects])
        rows = chosen.rows.take(unseen)
        at, before = served_features(
            self.store, self.snapshot, served.features, self.roster, chosen.at[unseen], rows, old_modes
        )
        common = rows.take(at)
        if len(np.unique(common.subjects)) < 2:
            return {}
        return {
            mode: self._difference(self._sweep(common, before[mode]), self._sweep(common, common.features[mode]))
            for mode in old_modes
        }

    def _pairs(self, rows: LabelledRows, mode: str) -> list[PairsResult]:
        return pairs_accuracy(rows, rows.features[mode], self.pairs, self.stored) if self.pairs else []


def _cell(cell: Cell, estimates: Mapping[MetricId, Estimate], fmrs: Sequence[str]) -> CellResult:
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


def _seen_by_models(
    store: Location, names: Sequence[str], models: Mapping[str, ModelRef]
) -> tuple[np.ndarray, dict[str, str]]:
    """Return whom any model was trained or chosen on, bool `[names]`, and mode → why its model does not tell."""
    seen = np.zeros(len(names), bool)
    untold = {}
    for mode, model in models.items():
        try:
            seen |= load((store / model.path).read_bytes()).has_seen(names)
        except FileNotFoundError as error:
            raise StoreError(f"{store.uri}/{model.path}: the model is missing.") from error
        except BadModelError as error:
            untold[mode] = str(error)
    return seen, untold
