"""Evaluate: verification and identification of every mode beside the raw baseline.

Two populations are measured: raw over every labelled subject, and every mode over the held-out subjects, which no model
was trained or selected on. The definitions are those of `metrics`. `tasks.gate` decides with the results,
`reports.html` shows them.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from metrics.allpairs import AllPairs
from metrics.variance import effective_subjects
from models.inference import Reweighter
from schemas.errors import BadModelError, StoreError
from schemas.index import IndexSettings
from schemas.metrics import ALL, HELD_OUT, RAW, measured_modes
from schemas.models import uses_batch
from schemas.releases import ModelRef, Release
from schemas.reports import Differences, Evaluation, ModeResult, Population
from schemas.settings import EvaluationSettings
from storage.location import Location
from storage.tables import Snapshot
from tasks.evaluation.identification import MEASURED_EXPAND, identify_mode
from tasks.evaluation.leakage import TrainingData, held_out_rows
from tasks.evaluation.pairs import Pairs, pairs_accuracy, read_pairs
from tasks.evaluation.rows import (
    LabelledRows,
    SubjectIndex,
    read_labelled,
    read_subject_index,
    sample_subjects,
    stored_ids,
)
from tasks.evaluation.served import served_features
from tasks.evaluation.verification import Verifier
from tasks.index import Previous

log = logging.getLogger("frontalis.evaluate")

FEW_EFFECTIVE = 0.5  # of all subjects; below, coverage falls (docs/metrics.md)
SERVED, ANCHOR = "the served release", "the anchor"


def evaluate(
    store: Location,
    release: str,
    features: Snapshot,
    models: Mapping[str, ModelRef],
    settings: EvaluationSettings,
    index: IndexSettings,
    served: Previous | None = None,
    anchor: Release | None = None,
    expand: int = 0,
) -> Evaluation:
    """Measure every mode of a features snapshot. There is no population where fewer than two subjects are labelled.

    Args:
        store: the store.
        release: name of the release, for the record.
        features: the files of the features table.
        models: mode → model; its training subjects are left out.
        settings: operating points, resamples, pairs file, limit on rows.
        index: how the identification index is built.
        served: the served release, to compare each mode with.
        anchor: the release whose models each mode is compared with, on the same rows.
        expand: rows of the query expansion that is measured; 0 for `MEASURED_EXPAND`.

    Raises:
        SettingsError: the pairs file cannot be used.
        StoreError: a feature file or a model is missing or damaged. Of the served release and the anchor, that is a
            note.
    """
    pairs, stored = None, frozenset[str]()
    if settings.pairs:
        ids = stored_ids(store, features)
        pairs, stored = read_pairs(settings.pairs).as_stored(ids), frozenset(map(str, ids.to_pylist()))
    modes = measured_modes(models)
    labelled = read_subject_index(store, features)
    training = TrainingData.of(store, models)
    held_out = held_out_rows(store, features, labelled, training, settings.max_rows)
    notes = list(held_out.notes)
    measure = _Measure(
        store,
        features,
        labelled,
        settings,
        index,
        models,
        pairs,
        frozenset(training.unknown),
        stored,
        Verifier(settings),
        expand or MEASURED_EXPAND,
    )
    sample = None
    if len(np.unique(labelled.subjects[held_out.rows])) > 1:
        sample = measure.sample(held_out.rows, modes)
    everybody = measure.sample(np.arange(len(labelled)), [RAW], sample)
    populations, unread = {}, dict[str, str]()
    if len(labelled.names) < 2:
        notes.append("fewer than two labelled subjects: nothing can be measured")
    else:
        populations[ALL] = measure.population(ALL, everybody, [RAW])
    if sample is None:
        notes.append("fewer than two labelled subjects are held out: modes cannot be compared")
    else:
        known = populations[ALL].modes if sample.rows is everybody.rows else {}
        genuine = measure.compare(sample, modes)[RAW].overall.counts.genuine.sum(axis=1)
        subjects, effective = len(np.unique(sample.rows.subjects)), effective_subjects(genuine)
        if 0 < effective < FEW_EFFECTIVE * subjects:
            notes.append(
                f"{subjects} held-out subjects weigh as much as {effective:.0f} with equally many genuine pairs: "
                "intervals of single rates are too narrow"
            )
        references = measure.references(sample, modes, served, anchor)
        unread = references.unread
        for which, why in unread.items():
            notes.append(f"not compared with {which}: {why}")
            log.warning("evaluation: %s", notes[-1])
        populations[HELD_OUT] = measure.population(HELD_OUT, sample, modes, references, known)
    return Evaluation(
        release=release,
        resamples=settings.resamples,
        seed=settings.seed,
        fmrs=list(settings.fmrs),
        unlabelled_rows=labelled.unlabelled,
        duplicate_rows=len(everybody.rows) - len(np.unique(everybody.rows.duplicates)),
        notes=notes,
        served_unread=unread.get(SERVED),
        anchor_unread=unread.get(ANCHOR),
        populations=populations,
    )


@dataclass(frozen=True)
class _Sample:
    """The rows to measure. `of` are all candidates and `at` the rows chosen, both places in the subject index."""

    of: np.ndarray
    at: np.ndarray
    rows: LabelledRows
    sampled_from: int | None


@dataclass(frozen=True)
class _References:
    """Differences by mode, to the served release and to the anchor, and by reference why it could not be read."""

    served: dict[str, Differences] = field(default_factory=dict)
    anchor: dict[str, Differences] = field(default_factory=dict)
    relative: dict[str, Differences] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Measure:
    """Measures populations of one release.

    `unknown` are the modes whose models do not record their training subjects. `stored` are the ids of all rows, for
    the pairs file.
    """

    store: Location
    snapshot: Snapshot
    labelled: SubjectIndex
    settings: EvaluationSettings
    index: IndexSettings
    models: Mapping[str, ModelRef]
    pairs: Pairs | None
    unknown: frozenset[str]
    stored: frozenset[str]
    verifier: Verifier
    expand: int

    def sample(self, rows: np.ndarray, modes: Sequence[str], earlier: _Sample | None = None) -> _Sample:
        """Read rows of the subject index in each mode, or a sample of their subjects where there are too many.

        Rows that an `earlier` sample has, in these modes and others, are not read again.
        """
        at, sampled_from = sample_subjects(self.labelled, rows, self.settings.max_rows)
        if earlier is not None and np.array_equal(at, earlier.at):
            return _Sample(rows, at, earlier.rows, sampled_from)
        read = read_labelled(self.store, self.snapshot, self.labelled, at, modes, self.settings)
        return _Sample(rows, at, read, sampled_from)

    def compare(self, sample: _Sample, modes: Sequence[str]) -> dict[str, AllPairs]:
        """Compare all pairs of a sample in each mode, and keep the result for later comparisons of the same rows."""
        return {mode: self.verifier.compare(sample.rows, sample.rows.features[mode], keep=True) for mode in modes}

    def population(
        self,
        name: str,
        sample: _Sample,
        modes: Sequence[str],
        references: _References | None = None,
        known: Mapping[str, ModeResult] | None = None,
    ) -> Population:
        """Measure each mode over a sample; `known` are results over the same rows."""
        versus = references or _References()
        rows, verifier = sample.rows, self.verifier
        compared = self.compare(sample, modes)
        results = dict(known or {})
        for mode in modes:
            if mode in results:
                continue
            log.info("evaluation: %s, %s: %d rows", name, mode, len(rows))
            ours = compared[mode]
            results[mode] = ModeResult(
                mode=mode,
                model_digest=self.models[mode].digest if mode in self.models else None,
                training_subjects_known=mode not in self.unknown,
                thresholds=verifier.thresholds(ours),
                fmr_by_score=ours.fmr_by_score,
                cells=verifier.cells(ours),
                difference={} if mode == RAW else verifier.differences(compared[RAW], ours),
                versus_served=versus.served.get(mode, {}),
                versus_anchor=versus.anchor.get(mode, {}),
                relative_to_anchor=versus.relative.get(mode, {}),
                versus_modes={
                    other: verifier.differences(compared[other], ours)
                    for other in modes[: modes.index(mode)]
                    if other != RAW
                },
                pairs=pairs_accuracy(rows, rows.features[mode], self.pairs, self.stored) if self.pairs else [],
                identification=identify_mode(
                    rows.features[mode],
                    rows.subjects,
                    rows.classes,
                    rows.duplicates,
                    self.index,
                    self.settings,
                    self.expand,
                ),
            )
        return Population(
            name=name,
            n_rows=len(rows),
            n_subjects=len(np.unique(rows.subjects)),
            left_out_subjects=len(self.labelled.names) - len(np.unique(self.labelled.subjects[sample.of])),
            left_out_rows=len(self.labelled) - len(sample.of),
            sampled_from_subjects=sample.sampled_from,
            modes=results,
        )

    def references(
        self, sample: _Sample, modes: Sequence[str], served: Previous | None, anchor: Release | None
    ) -> _References:
        """Compare with the served release and with the anchor, and say what could not be read."""
        found = _References()
        try:
            found.served.update(self.versus_served(sample, modes, served) if served else {})
        except StoreError as error:
            found.unread[SERVED] = str(error).rstrip(".")
        try:
            for mode, pairs in self.versus_anchor(sample, modes, anchor) if anchor else ():
                found.anchor[mode] = self.verifier.differences(*pairs)
                found.relative[mode] = self.verifier.relative_differences(*pairs)
        except (StoreError, BadModelError) as error:
            found.unread[ANCHOR] = str(error).rstrip(".")
        return found

    def versus_served(self, sample: _Sample, modes: Sequence[str], served: Previous) -> dict[str, Differences]:
        """Compare with the served release, by mode, over the rows of both that no model of either was trained on.

        A mode whose served model does not record its training subjects has no comparison.
        """
        there = {file.mode for file in served.features.files.values()}
        training = TrainingData.of(self.store, served.release.models)
        old_modes = [mode for mode in modes if mode != RAW and mode in there and mode not in training.unknown]
        if RAW not in there or not old_modes:
            return {}
        seen = training.seen(sample.rows.names, sample.rows.subjects, sample.rows.features[RAW])
        held_out = np.flatnonzero(~seen[sample.rows.subjects])
        rows = sample.rows.take(held_out)
        at, before = served_features(
            self.store, self.snapshot, served.features, self.labelled, sample.at[held_out], rows, old_modes
        )
        common = rows.take(at)
        if len(np.unique(common.subjects)) < 2:
            return {}
        compare, differences = self.verifier.compare, self.verifier.differences
        return {
            mode: differences(compare(common, before[mode]), compare(common, common.features[mode]))
            for mode in old_modes
        }

    def versus_anchor(
        self, sample: _Sample, modes: Sequence[str], anchor: Release
    ) -> Iterator[tuple[str, tuple[AllPairs, AllPairs]]]:
        """Yield each mode, and all pairs of the same rows as the model of the anchor makes them, and as they are.

        So the anchor needs no feature files. Rows that its models were trained on are left out. A mode that has the
        model of the anchor is not compared, nor one whose anchor does not record its training subjects, or has a
        statistic that depends on all rows of a batch.
        """
        training = TrainingData.of(self.store, anchor.models)
        others = [mode for mode in modes if mode in training.checkpoints and self._is_another(mode, anchor)]
        if not others:
            return
        seen = training.seen(sample.rows.names, sample.rows.subjects, sample.rows.features[RAW])
        rows = sample.rows.take(np.flatnonzero(~seen[sample.rows.subjects]))
        if len(np.unique(rows.subjects)) < 2:
            return
        for mode in others:
            network = Reweighter(training.checkpoints[mode], anchor.models[mode].statistic, self.settings.device)
            before = network(rows.features[RAW])["front"]
            yield mode, (self.verifier.compare(rows, before), self.verifier.compare(rows, rows.features[mode]))

    def _is_another(self, mode: str, anchor: Release) -> bool:
        model = anchor.models[mode]
        return model.digest != self.models[mode].digest and not uses_batch(mode, model.statistic)
