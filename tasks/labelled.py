"""The labelled rows of a features snapshot: those that know their subject, the same rows in the same order a mode."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from metrics.poses import pose_classes
from schemas.features import digest_of
from schemas.reports import RAW
from schemas.settings import EvaluationSettings
from storage.features import features_table, matrix_of, read_table
from storage.location import Location
from storage.tables import Snapshot


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


def stored_ids(store: Location, features: Snapshot) -> frozenset[str]:
    """Return the ids of all rows, whether they know their subject or not. Raises StoreError."""
    files = [file for file in features.files.values() if file.partitions["mode"] == RAW]
    return frozenset(str(value) for value in read_table(features_table(store), files, ["id"])["id"].to_pylist())


def sample_subjects(rows: LabelledRows, limit: int) -> tuple[LabelledRows, int | None]:
    """Return whole subjects, in the order of a hash of their names, up to `limit` rows; and of how many subjects."""
    if len(rows) <= limit:
        return rows, None
    present, counts = np.unique(rows.subjects, return_counts=True)
    order = sorted(range(len(present)), key=lambda at: digest_of(rows.names[present[at]].encode()))
    taken = np.cumsum(counts[order]) <= limit
    taken[:2] = True
    chosen = present[[at for at, take in zip(order, taken, strict=True) if take]]
    return rows.take(np.isin(rows.subjects, chosen)), len(present)
