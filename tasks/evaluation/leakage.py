"""Which subjects the models of a release were trained or selected on, so that they stay out of its evaluation.

A subject is seen where a model knows its name, or one of its rows: names change between data sets, vectors do not. Rows
are looked up for the subjects that are measured, so the work is in proportion to the evaluation.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.checkpoint import Checkpoint
from schemas.errors import BadModelError
from schemas.releases import ModelRef
from storage.location import Location
from storage.tables import Snapshot
from tasks.checkpoints import stored_checkpoint
from tasks.evaluation.rows import SubjectIndex, read_raw, sample_subjects

log = logging.getLogger("frontalis.evaluate")


@dataclass(frozen=True)
class TrainingData:
    """What the models of a release were trained or selected on, by mode.

    `unknown` gives, by mode, why a model does not record it. Those have no entry in `checkpoints`.
    """

    checkpoints: Mapping[str, Checkpoint]
    unknown: Mapping[str, str]

    @classmethod
    def of(cls, store: Location, models: Mapping[str, ModelRef]) -> "TrainingData":
        """Read the records of the models, given by mode. Raises StoreError where one is missing."""
        checkpoints, unknown = {}, {}
        for mode, model in models.items():
            try:
                checkpoint = stored_checkpoint(store, model)
                checkpoint.has_seen(())
            except BadModelError as error:
                unknown[mode] = str(error)
            else:
                checkpoints[mode] = checkpoint
        return cls(checkpoints, unknown)

    def names_seen(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return by mode, for each name, whether the model knows it."""
        return {mode: checkpoint.has_seen(names) for mode, checkpoint in self.checkpoints.items()}

    def owners_seen(self, subjects: np.ndarray, x: np.ndarray, n_subjects: int) -> dict[str, np.ndarray]:
        """Return by mode, for each of `n_subjects` subjects, whether the model knows one of its rows.

        Args:
            subjects: codes `[N]` of the rows' subjects, below `n_subjects`.
            x: raw embeddings `[N, D]`.
            n_subjects: how many subjects there are.
        """
        found = {}
        for mode, checkpoint in self.checkpoints.items():
            found[mode] = np.zeros(n_subjects, bool)
            found[mode][subjects[checkpoint.has_seen_rows(x)]] = True
        return found

    def seen(self, names: Sequence[str], subjects: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return, for each name, whether any model knows it or one of its rows (see `owners_seen`)."""
        seen = np.zeros(len(names), bool)
        for one in (self.names_seen(names), self.owners_seen(subjects, x, len(names))):
            for of_mode in one.values():
                seen |= of_mode
        return seen


@dataclass(frozen=True)
class HeldOut:
    """The rows of held-out subjects, as places in the subject index, ascending, and what a reader should know."""

    rows: np.ndarray
    notes: list[str]


def held_out_rows(
    store: Location, features: Snapshot, labelled: SubjectIndex, training: TrainingData, limit: int
) -> HeldOut:
    """Return the rows of the subjects that no model was trained or selected on.

    With more rows than `limit`, rows are looked up for the subjects that `sample_subjects` takes, until none of these
    is seen. Raises StoreError.
    """
    n_subjects = len(labelled.names)
    by_name = training.names_seen(labelled.names)
    by_row = {mode: np.zeros(n_subjects, bool) for mode in training.checkpoints}
    checked = np.zeros(len(labelled), bool)
    while True:
        seen = np.zeros(n_subjects, bool)
        for mode in by_name:
            seen |= by_name[mode] | by_row[mode]
        rows = np.flatnonzero(~seen[labelled.subjects])
        sample, _ = sample_subjects(labelled, rows, limit)
        new = sample[~checked[sample]]
        if not len(new) or all(one.seen_rows is None for one in training.checkpoints.values()):
            return HeldOut(rows, _notes(training, by_name, by_row))
        found = training.owners_seen(labelled.subjects[new], read_raw(store, features, labelled, new), n_subjects)
        for mode, of_mode in found.items():
            by_row[mode] |= of_mode
        checked[new] = True


def _notes(training: TrainingData, by_name: Mapping[str, np.ndarray], by_row: Mapping[str, np.ndarray]) -> list[str]:
    notes = []
    for mode, why in training.unknown.items():
        notes.append(f"mode {mode}: {why}; results may be optimistic: leakage cannot be excluded")
        log.warning("evaluation: %s", notes[-1])
    for mode, checkpoint in training.checkpoints.items():
        subjects, renamed = len(by_name[mode]), int((by_row[mode] & ~by_name[mode]).sum())
        if renamed:
            whom = "1 subject was" if renamed == 1 else f"{renamed:,} subjects were"
            also = "" if by_name[mode].any() else "; it knows nobody here by name: were the subjects renamed?"
            notes.append(
                f"warning: mode {mode}: {whom} left out whose rows the model was trained or selected on under other "
                f"names{also}"
            )
            log.warning("evaluation: %s", notes[-1].removeprefix("warning: "))
        elif subjects and not by_name[mode].any():
            notes.append(
                f"mode {mode}: the model was trained and selected on none of the {subjects:,} labelled subjects"
            )
            log.info("evaluation: %s", notes[-1])
        if checkpoint.seen_rows is None:
            notes.append(
                f"mode {mode}: the checkpoint records the names of its training subjects and not their rows, so a "
                "subject who was renamed is not recognised; train it again"
            )
            log.info("evaluation: %s", notes[-1])
    return notes
