"""The labelled rows of a features snapshot: those with a subject, the same rows in the same order for every mode.

First comes the subject index, which is small: where the rows of each subject are. Then the rows chosen from it are read
with their vectors. Files and row groups without such a row are not read, so reading is in proportion to what is
evaluated.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from metrics.poses import pose_classes
from schemas.features import VECTOR, digest_of
from schemas.metrics import RAW
from schemas.settings import EvaluationSettings
from storage.columns import known_subjects
from storage.features import features_table, matrix_of, read_rows, read_table, take_rows
from storage.location import Location
from storage.tables import FileTable, LiveFile, Snapshot


@dataclass(frozen=True)
class SubjectIndex:
    """Where every row with a subject is stored, ordered by shard and by row in its file.

    `subjects` are int64 codes `[N]` into `names`, which are sorted. `shard` are codes `[N]` into `shards`. `row` is the
    number `[N]` of the row in its file. `unlabelled` counts the rows without a subject.
    """

    names: list[str]
    subjects: np.ndarray
    shards: list[str]
    shard: np.ndarray
    row: np.ndarray
    unlabelled: int

    def __len__(self) -> int:
        return len(self.subjects)


@dataclass(frozen=True)
class LabelledRows:
    """Rows with a subject, the same rows in the same order for every mode.

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


def read_subject_index(store: Location, features: Snapshot) -> SubjectIndex:
    """Read the subject index. Raises StoreError."""
    table = features_table(store)
    files = files_of(features, RAW)
    columns, shard, row = [], [], []
    for code, file in enumerate(files.values()):
        start = 0
        for batch in read_rows(table, file, ["subject"]):
            # Features of earlier builds may hold blank names.
            columns.append(known_subjects(batch.column("subject"))[0].dictionary_encode())
            shard.append(np.full(batch.num_rows, code))
            row.append(np.arange(start, start + batch.num_rows))
            start += batch.num_rows
    if not columns:
        nothing = np.empty(0, np.int64)
        return SubjectIndex([], nothing, list(files), nothing, nothing, 0)
    subjects = pa.chunked_array(columns).unify_dictionaries()
    known = subjects.is_valid().to_numpy()
    found = subjects.chunk(0).dictionary.to_pylist()
    order = sorted(range(len(found)), key=found.__getitem__)
    rank = np.empty(len(found), np.int64)
    rank[order] = np.arange(len(found))
    codes = np.concatenate([pc.fill_null(chunk.indices, 0).to_numpy() for chunk in subjects.chunks])[known]
    return SubjectIndex(
        names=[found[at] for at in order],
        subjects=rank[codes] if len(codes) else np.empty(0, np.int64),
        shards=list(files),
        shard=np.concatenate(shard)[known],
        row=np.concatenate(row)[known],
        unlabelled=int((~known).sum()),
    )


def stored_ids(store: Location, features: Snapshot) -> pa.ChunkedArray:
    """Return the ids of all rows, with a subject or not. Raises StoreError."""
    return read_table(features_table(store), files_of(features, RAW).values(), ["id"])["id"]


def sample_subjects(labelled: SubjectIndex, rows: np.ndarray, limit: int) -> tuple[np.ndarray, int | None]:
    """Choose from `rows` whole subjects, in the order of a hash of their names, up to `limit` rows.

    Returns:
        The rows chosen, in order; and from how many subjects, or None where all were taken.
    """
    if len(rows) <= limit:
        return rows, None
    subjects = labelled.subjects[rows]
    present, counts = np.unique(subjects, return_counts=True)
    order = sorted(range(len(present)), key=lambda at: digest_of(labelled.names[present[at]].encode()))
    taken = np.cumsum(counts[order]) <= limit
    taken[:2] = True
    chosen = present[[at for at, take in zip(order, taken, strict=True) if take]]
    return rows[np.isin(subjects, chosen)], len(present)


def read_raw(store: Location, features: Snapshot, labelled: SubjectIndex, rows: np.ndarray) -> np.ndarray:
    """Read the raw embeddings of `rows` of the index (ascending), float32 `[n, D]`. Raises StoreError."""
    shards, at = np.array(labelled.shards, dtype=object)[labelled.shard[rows]], labelled.row[rows]
    read = rows_at(features_table(store), files_of(features, RAW), shards, at, ["front"])
    return matrix_of(read["front"], f"mode {RAW}")


def read_labelled(
    store: Location,
    features: Snapshot,
    labelled: SubjectIndex,
    rows: np.ndarray,
    modes: Sequence[str],
    settings: EvaluationSettings,
) -> LabelledRows:
    """Read `rows` of the index (ascending) with their features in each mode, `raw` among them. Raises StoreError."""
    table = features_table(store)
    shards, at = np.array(labelled.shards, dtype=object)[labelled.shard[rows]], labelled.row[rows]
    read = {
        mode: rows_at(
            table, files_of(features, mode), shards, at, ["id", "pose", "yaw", "front"] if mode == RAW else ["front"]
        )
        for mode in modes
    }
    matrices = {mode: np.ascontiguousarray(matrix_of(part["front"], f"mode {mode}")) for mode, part in read.items()}
    raw = read[RAW]
    yaw = raw["yaw"].to_numpy().astype(np.float64) if raw.num_rows else np.zeros(0)
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(row) for row in matrices[RAW]), np.uint64, raw.num_rows)
    return LabelledRows(
        ids=[str(value) for value in raw["id"].to_pylist()],
        names=labelled.names,
        subjects=labelled.subjects[rows],
        classes=pose_classes(raw["pose"].to_pylist(), yaw, edges=(settings.frontal_yaw, settings.profile_yaw)),
        duplicates=np.unique(hashes, return_inverse=True)[1],
        features=matrices,
    )


def rows_at(
    table: FileTable, files: Mapping[str, LiveFile], shards: np.ndarray, rows: np.ndarray, columns: Sequence[str]
) -> pa.Table:
    """Return row `rows[i]` of shard `shards[i]` for every i; rows of a shard are adjacent and ascend."""
    parts = [take_rows(table, files[shard], columns, rows[part]) for shard, part in _runs(shards)]
    if not parts:
        return pa.table({name: pa.array([], VECTOR if name == "front" else pa.string()) for name in columns})
    return pa.concat_tables(parts)


def files_of(features: Snapshot, mode: str) -> dict[str, LiveFile]:
    """Return the files of a mode by shard, in order."""
    return {file.shard: file for file in sorted(features.of_mode(mode), key=lambda file: file.shard)}


def _runs(shards: np.ndarray) -> Iterator[tuple[str, slice]]:
    """Yield each run of equal names, and its slice."""
    edges = np.flatnonzero(shards[1:] != shards[:-1]) + 1
    for start, stop in zip([0, *edges], [*edges, len(shards)], strict=True):
        if stop > start:
            yield shards[start], slice(start, stop)
