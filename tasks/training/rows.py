"""The rows that training reads: labelled, usable, each once, in one float32 array.

`storage.shards` reads shards, `schemas.shards` defines bad rows, `tasks.training.train` splits the subjects.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from metrics.poses import UNKNOWN, pose_classes
from models.split import subject_key
from schemas.errors import BadShardError, TrainingError
from schemas.settings import ColumnNames
from schemas.shards import Reason, check_shard
from storage.columns import angle_column, embedding_matrix, fitted_column, known_subjects
from storage.location import Location
from storage.shards import Shard, find_shards, read_schema, stream_blocks

log = logging.getLogger("frontalis.train")

READ_ROWS = 16_384
# Different from each other and from the salt of the split, so that the samples and the split are independent.
_READ_SALT, _TAKE_SALT = "rows that are read", "rows that are taken"
# Signs of a broken producer; a row without an embedding or a subject is ordinary.
REFUSED = {Reason.NOT_FINITE: "holds NaN or infinity", Reason.WRONG_LENGTH: "has another length than the others"}
NO_SUBJECT, BLANK_SUBJECT, REPEATED = "no_subject", "blank_subject", "read_before"


@dataclass(frozen=True)
class TrainingRows:
    """Labelled rows: `x` float32 `[N, D]` as stored, subject names, pose classes into `POSE_CLASSES`.

    `digest` covers all that was read. `skipped` counts the rows left out, by reason.
    """

    x: np.ndarray
    subjects: np.ndarray
    classes: np.ndarray
    digest: str
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, keep: np.ndarray) -> "TrainingRows":
        """Return the rows where `keep` is True, or those at its indices."""
        return TrainingRows(self.x[keep], self.subjects[keep], self.classes[keep], self.digest)

    def at_most(self, rows: int) -> "TrainingRows":
        """Return all rows, or about `rows` of them: those of a sample of subjects that depends on their names only."""
        share = rows / max(len(self), 1)
        return self if share >= 1 else self.take(_sampled(self.subjects, share, _TAKE_SALT))


def read_training_rows(
    sources: Sequence[str],
    columns: ColumnNames,
    max_rows: int | None = None,
    *,
    labelled: bool = True,
    skip_bad_rows: bool = True,
) -> TrainingRows:
    """Read the good, labelled rows of all shards of all sources, the same vector only once.

    Rows without a subject, with a bad embedding, or read before are left out and counted. With more rows than
    `max_rows` in the shards, a sample of the subjects is read, whole, about so many rows; the log says so. Unless
    `labelled`, rows without a subject are read too; their subject is empty.

    Raises:
        TrainingError: a shard lacks the subject column, has another D than those before, or breaks the contract;
            nothing is left; unless `skip_bad_rows`, an embedding that is not finite or of another length.
        SettingsError: a source does not exist.
    """
    shards = [shard for source in sources for shard in find_shards(Location(source), columns)]
    share = _share(shards, max_rows)
    digest = hashlib.blake2b(digest_size=16)
    known: set[int] = set()
    matrices, subjects, classes = [], [], []
    skipped = Counter[str]()
    dim: int | None = None
    for shard in shards:
        for width, block in _blocks(shard, columns, labelled, skip_bad_rows):
            dim = dim or width
            if width != dim:
                raise TrainingError(
                    f"shard {shard.key}: embeddings have {width} numbers, those before {dim}; a model takes one "
                    "length. Train on them apart."
                )
            x, names, poses, bad = block
            ours = _sampled(names, share, _READ_SALT) if share < 1 else np.ones(len(names), bool)
            x, names, poses = x[ours], names[ours], poses[ours]
            fresh = np.array([_is_new(row, known) for row in x], bool)
            skipped += bad + Counter({REPEATED: int((~fresh).sum())})
            matrices.append(x[fresh])
            subjects.append(names[fresh])
            classes.append(poses[fresh])
            digest.update(matrices[-1].tobytes())
            digest.update("\0".join(subjects[-1]).encode())
            digest.update(classes[-1].tobytes())
    if not sum(map(len, matrices)):
        what = "a subject and a usable embedding" if labelled else "a usable embedding"
        raise TrainingError(f"{', '.join(sources)}: no row with {what}.")
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
        log.warning("%s rows were left out: %s", f"{skipped.total():,}", reasons)
    return TrainingRows(
        np.concatenate(matrices), np.concatenate(subjects), np.concatenate(classes), digest.hexdigest(), dict(skipped)
    )


def _share(shards: Sequence[Shard], max_rows: int | None) -> float:
    """Return the share of subjects to read so that about `max_rows` rows are."""
    if max_rows is None:
        return 1.0
    try:
        total = sum(read_schema(shard)[1] for shard in shards)
    except BadShardError as error:
        raise _refusal(error) from error
    if total <= max_rows:
        return 1.0
    log.warning("train: of %d rows about %d are read, those of a sample of subjects", total, max_rows)
    return max_rows / total


Block = tuple[np.ndarray, np.ndarray, np.ndarray, Counter[str]]


def _blocks(shard: Shard, columns: ColumnNames, labelled: bool, skip_bad_rows: bool) -> Iterator[tuple[int, Block]]:
    """Yield D and (x, subjects, classes, how many rows were left out by reason) of each block of a shard."""
    try:
        schema = check_shard(shard.key, read_schema(shard)[0], columns)
        if labelled and "subject" not in schema.present:
            raise TrainingError(
                f"shard {shard.key}: has no column {columns.subject!r}, so there are no genuine pairs; name it with "
                "--column subject=NAME, or train on labelled shards."
            )
        wanted = [columns.embedding, *(getattr(columns, role) for role in schema.present)]
        width = schema.dim
        for first, block in stream_blocks(shard, wanted, READ_ROWS):
            width = width or _usual_length(block.column(columns.embedding))
            if width is None:
                continue
            matrix, reasons = embedding_matrix(block.column(columns.embedding), width)
            if not skip_bad_rows:
                _refuse(shard, first, reasons)
            texts: dict[str, pa.Array] = {
                role: fitted_column(shard.key, name, block.column(name), pa.string(), first)
                for role in ("subject", "pose")
                if role in schema.present and (name := getattr(columns, role))
            }
            yaw = block.column(columns.yaw) if "yaw" in schema.present else None
            yield width, _block(matrix, reasons, texts, yaw, labelled)
    except BadShardError as error:
        raise _refusal(error) from error


def _refuse(shard: Shard, first: int, reasons: np.ndarray) -> None:
    for row in np.flatnonzero(reasons != None):  # noqa: E711
        if reasons[row] in REFUSED:
            raise TrainingError(
                f"shard {shard.key}, row {first + row}: the embedding {REFUSED[reasons[row]]}; fix the shard, or "
                "leave out such rows with --skip-bad-rows."
            )


def _block(
    matrix: np.ndarray, reasons: np.ndarray, texts: Mapping[str, pa.Array], yaw: pa.Array | None, labelled: bool
) -> Block:
    good = reasons == None  # noqa: E711
    bad = Counter(str(reason) for reason in reasons[~good])
    names = texts.get("subject", pa.nulls(len(good), pa.string()))
    if labelled:
        for reason, column in ((NO_SUBJECT, names), (BLANK_SUBJECT, known_subjects(names)[0])):
            named = column.is_valid().to_numpy(zero_copy_only=False)
            bad[reason] += int((good & ~named).sum())
            good &= named
    names, _ = known_subjects(names)
    pose = texts["pose"].to_pylist() if "pose" in texts else None
    angles = None if yaw is None else angle_column(yaw)[0].to_numpy(zero_copy_only=False).astype(np.float64)
    unlabelled = pose is None and angles is None
    classes = np.full(len(good), UNKNOWN, np.int64) if unlabelled else pose_classes(pose, angles)
    subjects = np.array(names.fill_null("").to_pylist(), dtype=object)
    return np.ascontiguousarray(matrix[good]), subjects[good], classes[good], bad


def _usual_length(column: pa.Array) -> int | None:
    lengths = pc.drop_null(pc.list_value_length(column))
    return int(pc.mode(lengths)[0].as_py()["mode"]) if len(lengths) else None


def _is_new(row: np.ndarray, known: set[int]) -> bool:
    """Return whether the same bytes were not seen before, and remember them."""
    size, key = len(known), xxhash.xxh3_64_intdigest(row.tobytes())
    known.add(key)
    return len(known) > size


def _sampled(subjects: np.ndarray, share: float, salt: str) -> np.ndarray:
    names, inverse = np.unique(subjects, return_inverse=True)
    edge = share * 2**64
    return np.array([subject_key(name, salt) % 2**64 < edge for name in names], bool)[inverse]


def _refusal(error: BadShardError) -> TrainingError:
    return TrainingError(f"{error} Fix it or leave it out of the training.")
