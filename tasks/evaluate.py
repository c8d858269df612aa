"""Evaluate: verification and identification figures of every mode beside the raw baseline.

Rows are taken from the features at one table version; subjects that a model has seen in training or validation are left
out wherever modes are compared, and their number is told. The definitions are those of `metrics`; what is done with the
figures is left to `tasks.gate` and `tasks.report`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from metrics.allpairs import AllPairs, Cell, all_pairs
from metrics.bootstrap import CellIntervals, Interval, bootstrap, paired_bootstrap
from metrics.cosine import pair_scores
from metrics.folds import accuracy_by_protocol
from metrics.poses import POSE_CLASSES, pose_classes
from metrics.verification import verify
from models.checkpoint import load
from schemas.errors import BadModelError, SettingsError
from schemas.features import digest_of
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
from storage.features import features_table, matrix_of, read_table
from storage.location import Location
from storage.tables import Snapshot
from tasks.identify import identify_mode

log = logging.getLogger("frontalis.evaluate")

HELD_OUT = "held_out"


@dataclass(frozen=True)
class LabelledRows:
    """The rows that know their subject: the same rows in the same order for every mode.

    `subjects` are int64 codes `[N]` into `names`; `classes` codes into `POSE_CLASSES`; `duplicates` equal where the raw
    embeddings are byte-identical; `features` maps a mode to float32 `[N, D]`.
    """

    ids: list[str]
    names: list[str]
    subjects: np.ndarray
    classes: np.ndarray
    duplicates: np.ndarray
    features: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> "LabelledRows":
        """Return a selection of rows (indices or mask)."""
        at = np.flatnonzero(rows) if rows.dtype == bool else rows
        return LabelledRows(
            [self.ids[row] for row in at],
            self.names,
            self.subjects[at],
            self.classes[at],
            self.duplicates[at],
            {mode: matrix[at] for mode, matrix in self.features.items()},
        )


def evaluate(
    store_uri: str,
    release: str,
    features: Snapshot,
    models: Mapping[str, ModelRef],
    settings: EvaluationSettings,
    index: IndexSettings,
    served: Snapshot | None = None,
) -> Evaluation:
    """Measure every mode of a features snapshot; no population at all where fewer than two subjects are labelled.

    Args:
        store_uri: the store.
        release: name of the release, for the record.
        features: the files of the features table.
        models: mode → model, to know which subjects to leave out.
        settings: operating points, resamples, pairs file, limit on rows.
        index: how the identification index is built.
        served: the files of the release that is served until now, to compare each mode with.

    Raises:
        SettingsError: the pairs file cannot be used.
        StoreError: a feature file is damaged.
    """
    store = Location(store_uri)
    modes = [RAW, *sorted(models, reverse=True)]
    labelled, unlabelled = labelled_rows(store, features, modes, settings)
    seen, notes = _seen_by_models(store, labelled.names, models)
    held_out = labelled.take(~seen[labelled.subjects])
    left_out = int(seen.sum())
    populations = {}
    if len(labelled.names) < 2:
        notes.append("fewer than two labelled subjects: nothing can be measured")
    else:
        everybody, sampled = _sample(labelled, settings.max_rows)
        populations[ALL] = _population(ALL, everybody, [RAW], {}, settings, index, sampled, 0, 0)
    if len(np.unique(held_out.subjects)) < 2:
        notes.append("fewer than two labelled subjects that no model has seen: modes cannot be compared")
    else:
        chosen, sampled = _sample(held_out, settings.max_rows)
        populations[HELD_OUT] = _population(
            HELD_OUT,
            chosen,
            modes,
            models,
            settings,
            index,
            sampled,
            left_out,
            len(labelled) - len(held_out),
            _served_rows(store, served, chosen, modes, settings) if served is not None else None,
        )
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


def labelled_rows(
    store: Location, features: Snapshot, modes: Sequence[str], settings: EvaluationSettings
) -> tuple[LabelledRows, int]:
    """Read the rows that have a subject, and how many have none. Raises StoreError."""
    table = features_table(store)
    columns: dict[str, pa.Table] = {}
    for mode in modes:
        files = [file for _, file in sorted(features.files.items()) if file.partitions["mode"] == mode]
        files.sort(key=lambda file: file.partitions["shard"])
        wanted = ["id", "subject", "pose", "yaw", "front"] if mode == modes[0] else ["id", "front"]
        columns[mode] = read_table(table, files, wanted)
    first = columns[modes[0]]
    known = first["subject"].is_valid().combine_chunks()
    keep = known.to_numpy(zero_copy_only=False)
    rows = first.filter(known)
    matrices = {
        mode: np.ascontiguousarray(matrix_of(columns[mode].filter(known)["front"], f"mode {mode}")) for mode in modes
    }
    names, subjects = np.unique(np.array(rows["subject"].to_pylist(), dtype=object), return_inverse=True)
    yaw = rows["yaw"].to_numpy().astype(np.float64) if rows.num_rows else np.zeros(0)
    classes = pose_classes(rows["pose"].to_pylist(), yaw, edges=(settings.frontal_yaw, settings.profile_yaw))
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(row) for row in matrices[modes[0]]), np.uint64, rows.num_rows)
    _, duplicates = np.unique(hashes, return_inverse=True)
    labelled = LabelledRows(
        [str(value) for value in rows["id"].to_pylist()], names.tolist(), subjects, classes, duplicates, matrices
    )
    return labelled, int((~keep).sum())


def _population(
    name: str,
    rows: LabelledRows,
    modes: Sequence[str],
    models: Mapping[str, ModelRef],
    settings: EvaluationSettings,
    index: IndexSettings,
    sampled: int | None,
    left_out_subjects: int,
    left_out_rows: int,
    served: LabelledRows | None = None,
) -> Population:
    swept = {mode: _sweep(rows, rows.features[mode], settings) for mode in modes}
    before = _before(rows, served, modes, settings, swept) if served is not None else {}
    results = {}
    for mode in modes:
        log.info("evaluation: %s, %s: %d rows", name, mode, len(rows))
        intervals = _intervals(swept[mode], settings)
        difference = {} if mode == RAW else _difference(swept[RAW], swept[mode], settings)
        results[mode] = ModeResult(
            mode=mode,
            model_digest=models[mode].digest if mode in models else None,
            thresholds={fmr: swept[mode].overall.verification.at(float(fmr)).threshold for fmr in settings.fmrs},
            cells={one.name: _cell(one, intervals.get(one.name), settings.fmrs) for one in swept[mode]},
            difference=difference,
            versus_served=before.get(mode, {}),
            pairs=_pairs(rows, rows.features[mode], settings.pairs) if settings.pairs else [],
            identification=identify_mode(rows.features[mode], rows.subjects, rows.classes, index, settings),
        )
    return Population(
        name=name,
        n_rows=len(rows),
        n_subjects=len(np.unique(rows.subjects)),
        left_out_subjects=left_out_subjects,
        left_out_rows=left_out_rows,
        sampled_from_subjects=sampled,
        modes=results,
    )


def _sweep(rows: LabelledRows, features: np.ndarray, settings: EvaluationSettings) -> AllPairs:
    return all_pairs(
        features,
        rows.subjects,
        classes=rows.classes,
        class_names=POSE_CLASSES,
        duplicates=rows.duplicates,
        fmr_points=tuple(float(fmr) for fmr in settings.fmrs),
    )


def _intervals(pairs: AllPairs, settings: EvaluationSettings) -> dict[str, CellIntervals]:
    return bootstrap(pairs, resamples=settings.resamples, seed=settings.seed) if settings.resamples else {}


def _difference(base: AllPairs, other: AllPairs, settings: EvaluationSettings) -> dict[str, dict[str, Estimate]]:
    if not settings.resamples:
        return {}
    paired = paired_bootstrap(base, other, resamples=settings.resamples, seed=settings.seed)
    return {
        cell: {
            "eer": _estimate(one.eer),
            "auc": _estimate(one.auc),
            **{f"fnmr@{fmr}": _estimate(one.fnmr_own.get(float(fmr))) for fmr in settings.fmrs},
            **{f"fnmr_global@{fmr}": _estimate(one.fnmr_global.get(float(fmr))) for fmr in settings.fmrs},
        }
        for cell, one in paired.items()
    }


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


def _estimate(interval: Interval | None) -> Estimate:
    if interval is None or interval.estimate is None:
        return Estimate(value=None, reason="not estimable")
    return Estimate(value=interval.estimate, low=interval.low, high=interval.high)


def _pairs(rows: LabelledRows, features: np.ndarray, path: str) -> list[PairsResult]:
    table = read_pairs(path)
    place = {name: at for at, name in enumerate(rows.ids)}
    first = np.array([place.get(name, -1) for name in table["id_a"].to_pylist()], np.int64)
    second = np.array([place.get(name, -1) for name in table["id_b"].to_pylist()], np.int64)
    same = table["same"].to_numpy(zero_copy_only=False).astype(bool)
    folds = table["fold"].to_numpy().astype(np.int64)
    protocols = np.array(table["protocol"].to_pylist(), dtype=object)
    there = (first >= 0) & (second >= 0)
    results = []
    for protocol in sorted(set(protocols.tolist())):
        of = protocols == protocol
        use = of & there
        missing = int((of & ~there).sum())
        if not use.any() or len(np.unique(folds[use])) < 2:
            results.append(
                PairsResult(
                    protocol=protocol,
                    n_pairs=int(use.sum()),
                    missing=missing,
                    n_folds=len(np.unique(folds[use])),
                    accuracy_mean=None,
                    accuracy_sd=None,
                    eer=None,
                    reason="not estimable: pairs of at least two folds are needed, to choose the threshold on others",
                )
            )
            continue
        scores = pair_scores(features, first[use], second[use])
        accuracy = accuracy_by_protocol(scores, same[use], folds[use], [protocol] * int(use.sum()))[protocol]
        results.append(
            PairsResult(
                protocol=protocol,
                n_pairs=int(use.sum()),
                missing=missing,
                n_folds=len(accuracy.folds),
                accuracy_mean=accuracy.mean,
                accuracy_sd=accuracy.sd,
                eer=verify(scores[same[use]], scores[~same[use]]).eer.rate,
            )
        )
    return results


def read_pairs(path: str) -> pa.Table:
    """Read a pairs file: columns protocol, fold, id_a, id_b (text or integer) and same (bool).

    Raises:
        SettingsError: no such file, or a column is missing or of another type.
    """
    try:
        table = pq.ParquetFile(path, pre_buffer=False).read(use_threads=False)
    except FileNotFoundError as error:
        raise SettingsError(f"pairs {path}: there is no such file.") from error
    except (pa.ArrowException, OSError) as error:
        raise SettingsError(f"pairs {path}: cannot be read as Parquet ({str(error).splitlines()[0][:120]}).") from error
    missing = [name for name in ("id_a", "id_b", "same") if name not in table.column_names]
    if missing:
        raise SettingsError(
            f"pairs {path}: column {missing[0]!r} is missing; wanted protocol, fold, id_a, id_b, same, found "
            f"{', '.join(table.column_names)}."
        )
    if "protocol" not in table.column_names:
        table = table.append_column("protocol", pa.repeat(pa.scalar("pairs"), table.num_rows))
    if "fold" not in table.column_names:
        table = table.append_column("fold", pa.repeat(pa.scalar(0), table.num_rows))
    try:
        return pa.table(
            {
                "protocol": table["protocol"].cast(pa.string()),
                "fold": table["fold"].cast(pa.int64()),
                "id_a": table["id_a"].cast(pa.string()),
                "id_b": table["id_b"].cast(pa.string()),
                "same": table["same"].cast(pa.bool_()),
            }
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SettingsError(f"pairs {path}: {error}; wanted text ids, an integer fold and a boolean 'same'.") from error


def _seen_by_models(
    store: Location, names: Sequence[str], models: Mapping[str, ModelRef]
) -> tuple[np.ndarray, list[str]]:
    """Return whom any model was trained or chosen on, bool `[names]`, and notes on models that do not tell."""
    seen = np.zeros(len(names), bool)
    notes = []
    for mode, model in models.items():
        try:
            seen |= load((store / model.path).read_bytes()).has_seen(names)
        except BadModelError as error:
            notes.append(f"mode {mode}: {error}; its figures may be flattered by leaks")
            log.warning("evaluation: %s", notes[-1])
    return seen, notes


def _sample(rows: LabelledRows, limit: int) -> tuple[LabelledRows, int | None]:
    """Return whole subjects, in the order of a hash of their names, up to `limit` rows; and of how many subjects."""
    if len(rows) <= limit:
        return rows, None
    present, counts = np.unique(rows.subjects, return_counts=True)
    order = sorted(range(len(present)), key=lambda at: digest_of(rows.names[present[at]].encode()))
    taken = np.cumsum(counts[order]) <= limit
    taken[:2] = True
    chosen = present[[at for at, take in zip(order, taken, strict=True) if take]]
    return rows.take(np.isin(rows.subjects, chosen)), len(present)


def _served_rows(
    store: Location, served: Snapshot, rows: LabelledRows, modes: Sequence[str], settings: EvaluationSettings
) -> LabelledRows | None:
    """Return those of `rows` that the served release has too, with its features; None where there is none."""
    there = {file.partitions["mode"] for file in served.files.values()}
    if not set(modes) <= there:
        modes = [mode for mode in modes if mode in there]
    if RAW not in modes or len(modes) < 2:
        return None
    old, _ = labelled_rows(store, served, modes, settings)
    place = {name: at for at, name in enumerate(old.ids)}
    common = [place[name] for name in rows.ids if name in place]
    return old.take(np.array(common, np.int64)) if common else None


def _before(
    rows: LabelledRows,
    served: LabelledRows,
    modes: Sequence[str],
    settings: EvaluationSettings,
    swept: Mapping[str, AllPairs],
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Return mode → cell → metric → this mode − the same mode as served until now, over the rows both have."""
    wanted = set(served.ids)
    common = rows.take(np.array([name in wanted for name in rows.ids], bool))
    if len(np.unique(common.subjects)) < 2:
        return {}
    result = {}
    for mode in modes:
        if mode == RAW or mode not in served.features:
            continue
        whole = len(common) == len(rows)
        new = swept[mode] if whole else _sweep(common, common.features[mode], settings)
        old = _sweep(common, served.features[mode], settings)
        result[mode] = _difference(old, new, settings)
    return result
