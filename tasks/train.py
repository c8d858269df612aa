"""Train: read labelled shards, split the subjects, fit a network, measure it on unseen subjects, write the checkpoint.

Subjects fall into train, validation and test by a salted hash of their name, so no person is in two parts. The loop
itself is `models.training`.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import JsonValue
from torch import nn

from metrics.allpairs import AllPairs, all_pairs
from metrics.bootstrap import paired_bootstrap
from metrics.poses import POSE_CLASSES, UNKNOWN, pose_classes
from models.architectures import build, check_arguments
from models.checkpoint import library_versions, to_bytes
from models.inference import normalise
from models.training import Fitted, LabelledTensor, fit
from schemas.errors import BadShardError, TrainingError
from schemas.models import ModelCard
from schemas.settings import ColumnNames, TrainingSettings
from schemas.shards import angle_column, check_shard, embedding_matrix, text_column
from schemas.split import SplitRule, split_of, subject_key
from storage.location import Location
from storage.shards import find_shards, open_shard, stream_blocks
from tasks.model_card import card_markdown

log = logging.getLogger("frontalis.train")

FEWEST_SUBJECTS = 10
BLOCK_ROWS = 16_384
CELL = "frontal-profile"


@dataclass(frozen=True)
class TrainingRows:
    """Labelled rows: `x` float32 `[N, D]` as stored, subject names, pose classes into `POSE_CLASSES`."""

    x: np.ndarray
    subjects: np.ndarray
    classes: np.ndarray
    digest: str
    skipped: int

    def __len__(self) -> int:
        return len(self.x)

    def take(self, keep: np.ndarray) -> "TrainingRows":
        """Return the rows where `keep` is True, or those at its indices."""
        return TrainingRows(self.x[keep], self.subjects[keep], self.classes[keep], self.digest, 0)


@dataclass(frozen=True)
class Trained:
    """What training came to; `improved` is False where no step beat the raw embeddings on validation."""

    out: str
    card: ModelCard
    improved: bool
    interrupted: bool
    best_step: int
    table: dict[str, dict[str, dict[str, float | None]]]
    parts: dict[str, int]


def train_model(settings: TrainingSettings) -> Trained:
    """Train one checkpoint and write it with its card.

    Raises:
        TrainingError: too few subjects, no subject with two rows, no subject column, mixed dimensions.
        SettingsError: a source does not exist.
    """
    rows = read_training_rows(settings.sources, settings.columns)
    rule = SplitRule(
        salt=settings.salt,
        train=1 - settings.validation - settings.test,
        validation=settings.validation,
        test=settings.test,
    )
    part = {name: split_of(name, rule) for name in np.unique(rows.subjects)}
    parts = {
        name: rows.take(np.array([part[s] == name for s in rows.subjects], bool))
        for name in ("train", "validation", "test")
    }
    _check(rows, parts)
    learn = parts["train"]
    if settings.augment:
        more = read_training_rows(settings.augment, settings.columns)
        learn = _joined(learn, more.take(np.isin(more.subjects, np.unique(learn.subjects))))
    dim = rows.x.shape[1]
    arguments = _arguments(settings, dim)
    torch.manual_seed(settings.seed)
    model = build(settings.architecture, arguments)
    log.info(
        "train: %d subjects and %d rows to learn from, %d to choose, %d to measure; D = %d",
        len(np.unique(learn.subjects)), len(learn), len(np.unique(parts["validation"].subjects)),
        len(np.unique(parts["test"].subjects)), dim,
    )  # fmt: skip
    fitted = _fit(settings, model, learn, parts["validation"])
    table, intervals = _measure(fitted.model, parts, settings)
    improved = fitted.best_step > 0
    if not improved:
        log.warning(
            "train: NO STEP WAS BETTER THAN RAW on the validation subjects; the model written gives raw embeddings "
            "back. Train on more subjects or views."
        )
    seen = np.unique(np.concatenate([parts["train"].subjects, parts["validation"].subjects]))
    card = ModelCard(
        architecture=settings.architecture,
        arguments=arguments,
        mode=settings.mode,
        embedding_dim=dim,
        normalisation="l2",
        training_data=rows.digest,
        split=rule,
        metrics={
            "best_step": fitted.best_step,
            "improved_on_validation": improved,
            "validation_score": {str(step): score for step, score in fitted.scores.items()},
            "figures": json.loads(json.dumps(table)),
            "difference": json.loads(json.dumps(intervals)),
            "subjects": {name: len(np.unique(p.subjects)) for name, p in parts.items()},
            "rows": {name: len(p) for name, p in parts.items()},
        },
        versions=library_versions(),
    )
    keys = np.array([subject_key(name, rule.salt) for name in seen], np.int64)
    content = to_bytes(card, fitted.model, keys)
    Location(settings.out).write_bytes(content)
    Location(f"{settings.out}.md").write_bytes(card_markdown(card).encode())
    return Trained(
        out=settings.out,
        card=card,
        improved=improved,
        interrupted=fitted.interrupted,
        best_step=fitted.best_step,
        table=table,
        parts={name: len(np.unique(p.subjects)) for name, p in parts.items()},
    )


def read_training_rows(sources: Sequence[str], columns: ColumnNames) -> TrainingRows:
    """Read the good, labelled rows of all shards of all sources.

    Raises:
        TrainingError: a shard lacks the subject column, has another D than the first, or breaks the contract; nothing
            is left.
    """
    matrices, subjects, classes, skipped = [], [], [], 0
    digest = hashlib.blake2b(digest_size=16)
    dim: int | None = None
    for source in sources:
        for shard in find_shards(source):
            try:
                with open_shard(shard) as parquet:
                    schema = check_shard(shard.key, parquet.schema_arrow, columns)
                if "subject" not in schema.present:
                    raise TrainingError(
                        f"shard {shard.key}: has no column {columns.subject!r}, so nobody knows who is who; name it "
                        "under [columns], or train on labelled shards."
                    )
                names = [columns.embedding, *(getattr(columns, role) for role in schema.present)]
                for _, block in stream_blocks(shard, names, BLOCK_ROWS):
                    width = schema.dim or dim or _first_length(block.column(columns.embedding))
                    dim = dim or width
                    if width != dim:
                        raise TrainingError(
                            f"shard {shard.key}: embeddings have {width} numbers, those before {dim}; a model "
                            "takes one length. Train on them apart."
                        )
                    matrix, reasons = embedding_matrix(block.column(columns.embedding), dim)
                    names_here = text_column(block.column(columns.subject))
                    keep = (reasons == None) & names_here.is_valid().to_numpy(zero_copy_only=False)  # noqa: E711
                    skipped += int((~keep).sum())
                    pose = text_column(block.column(columns.pose)).to_pylist() if "pose" in schema.present else None
                    yaw = (
                        angle_column(block.column(columns.yaw))[0].to_numpy(zero_copy_only=False).astype(np.float64)
                        if "yaw" in schema.present
                        else None
                    )
                    matrices.append(np.ascontiguousarray(matrix[keep]))
                    subjects.append(np.array(names_here.to_pylist(), dtype=object)[keep])
                    classes.append(_classes(pose, yaw, len(keep))[keep])
                    digest.update(matrices[-1].tobytes())
                    digest.update("\0".join(subjects[-1]).encode())
            except BadShardError as error:
                raise TrainingError(f"{error} Mend it or leave it out of the training.") from error
    if not matrices or not sum(map(len, matrices)):
        raise TrainingError(f"{', '.join(sources)}: no row with a subject and a usable embedding.")
    if skipped:
        log.warning("train: %d rows without a subject or with a bad embedding were left out", skipped)
    return TrainingRows(
        np.concatenate(matrices), np.concatenate(subjects), np.concatenate(classes), digest.hexdigest(), skipped
    )


def _fit(settings: TrainingSettings, model: nn.Module, learn: TrainingRows, choose: TrainingRows) -> Fitted:
    x = normalise(torch.from_numpy(choose.x), "l2")
    names, codes = np.unique(choose.subjects, return_inverse=True)
    del names

    def score(network: nn.Module) -> float:
        return validation_score(_sweep(_apply(network, x), codes, choose.classes))

    def report(step: int, loss: float, value: float) -> None:
        log.info("train: step %4d, loss %.4f, validation score %.4f", step, loss, value)

    _, subjects = np.unique(learn.subjects, return_inverse=True)
    rows = LabelledTensor(torch.from_numpy(learn.x), torch.from_numpy(subjects))
    return fit(model, rows, score, steps=settings.steps, seed=settings.seed, report=report)


def validation_score(pairs: AllPairs) -> float:
    """Return what early stopping minimises: the EER of frontal–profile pairs, of all pairs where there are none."""
    cell = pairs.cells.get(CELL)
    if cell is None or cell.verification.eer.rate is None:
        cell = pairs.overall
    rate = cell.verification.eer.rate
    return 1.0 if rate is None else rate


def _measure(
    model: nn.Module, parts: Mapping[str, TrainingRows], settings: TrainingSettings
) -> tuple[dict[str, dict[str, dict[str, float | None]]], dict[str, dict[str, list[float | None]]]]:
    """Return, over the test subjects (the validation ones where there are none), figures by mode and cell, and the
    paired differences to raw with their intervals."""
    rows = parts["test"] if len(np.unique(parts["test"].subjects)) > 1 else parts["validation"]
    x = normalise(torch.from_numpy(rows.x), "l2")
    _, codes = np.unique(rows.subjects, return_inverse=True)
    swept = {
        "raw": _sweep(rows.x, codes, rows.classes),
        settings.mode: _sweep(_apply(model, x), codes, rows.classes),
    }
    table = {
        mode: {
            cell.name: {
                "eer": cell.verification.eer.rate,
                "fnmr@1e-2": cell.verification.at(1e-2).fnmr,
                "fnmr@1e-3": cell.verification.at(1e-3).fnmr,
            }
            for cell in pairs
        }
        for mode, pairs in swept.items()
    }
    paired = paired_bootstrap(swept["raw"], swept[settings.mode], resamples=settings.resamples, seed=settings.seed)
    intervals = {
        name: {
            "eer": [cell.eer.estimate, cell.eer.low, cell.eer.high],
            "fnmr@1e-3": [getattr(cell.fnmr_own[1e-3], end) for end in ("estimate", "low", "high")],
        }
        for name, cell in paired.items()
    }
    return table, intervals


def _sweep(features: np.ndarray, subjects: np.ndarray, classes: np.ndarray) -> AllPairs:
    return all_pairs(features, subjects, classes=classes, class_names=POSE_CLASSES)


def _apply(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([model(block).numpy() for block in torch.split(x, BLOCK_ROWS)])


def _arguments(settings: TrainingSettings, dim: int) -> dict[str, JsonValue]:
    size: dict[str, JsonValue] = {"channels": dim} if settings.architecture == "se" else {"feature_dim": dim}
    reduction = min(16, dim)
    return check_arguments(
        settings.architecture, {**size, "reduction": reduction, "use_batch_stat": settings.mode == "batch_stat"}
    ).model_dump()


def _check(rows: TrainingRows, parts: Mapping[str, TrainingRows]) -> None:
    names, counts = np.unique(rows.subjects, return_counts=True)
    if len(names) < FEWEST_SUBJECTS:
        raise TrainingError(
            f"{len(names)} subjects are too few to train, choose and measure on; {FEWEST_SUBJECTS} are the least, some "
            "hundred are wanted."
        )
    if not (counts > 1).any():
        raise TrainingError(
            f"each of the {len(names)} subjects has a single row, so there is no genuine pair to learn from; add more "
            "samples of the same subjects."
        )
    for name in ("train", "validation"):
        _, counts = np.unique(parts[name].subjects, return_counts=True)
        if len(counts) < 2 or not (counts > 1).any():
            raise TrainingError(
                f"the {name} part has {len(counts)} subjects and no genuine pair; pass more subjects, or another salt."
            )


def _joined(first: TrainingRows, second: TrainingRows) -> TrainingRows:
    if len(second) and first.x.shape[1] != second.x.shape[1]:
        raise TrainingError(
            f"--augment: embeddings have {second.x.shape[1]} numbers, the sources {first.x.shape[1]}; "
            "use those of the same network."
        )
    return TrainingRows(
        np.concatenate([first.x, second.x]) if len(second) else first.x,
        np.concatenate([first.subjects, second.subjects]),
        np.concatenate([first.classes, second.classes]),
        first.digest,
        first.skipped,
    )


def _classes(pose: Sequence[str | None] | None, yaw: np.ndarray | None, rows: int) -> np.ndarray:
    if pose is None and yaw is None:
        return np.full(rows, UNKNOWN)
    return pose_classes(pose, yaw)


def _first_length(column: pa.Array) -> int:
    lengths = pc.drop_null(pc.list_value_length(column))
    return int(lengths[0].as_py()) if len(lengths) else 1
