"""Reweight: read the embeddings of a shard, apply every model, write the feature files.

A shard is streamed in blocks of consecutive rows, so memory stays bounded whatever its size. A block has the same
rows wherever it is computed: workers, retries and row groups never change a feature. Bad rows go to the shard's
quarantine file. Nothing is visible until `tasks.publish` commits it.
"""

import contextlib
import functools
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from models.inference import Reweighter
from schemas.errors import BadModelError, BadShardError, FrontalisError, clipped
from schemas.features import BLOCK_ROWS, QUARANTINE_SCHEMA, VECTOR, VECTOR_COLUMNS, FeatureKey, file_schema
from schemas.metrics import RAW
from schemas.models import Precision, uses_batch
from schemas.releases import ModelRef
from schemas.reports import ShardFault
from schemas.settings import ColumnNames, Device, PipelineSettings
from schemas.shards import Reason, ShardSchema, check_shard
from storage.columns import angle_column, embedding_matrix, fitted_column, known_subjects
from storage.features import features_table, parquet_writer, quarantine_table, vector_column, write_quarantine
from storage.location import Location
from storage.shards import read_schema, still_same, stream_blocks
from storage.tables import LiveFile
from storage.tombstones import Tombstones
from tasks.checkpoints import stored_checkpoint
from tasks.plan import ShardWork

log = logging.getLogger("frontalis.reweight")

# Set by a run whose workers are threads of its own process. Once it is set, they end after their present block.
stopping: ContextVar[threading.Event | None] = ContextVar("stopping", default=None)
FEWEST_BAD_ROWS = 10  # fewer bad rows go to quarantine, however small the shard
RADIANS_BELOW = 3.2
RADIANS_ROWS = 50


@dataclass(frozen=True)
class ReweightSpec:
    """All that a worker needs to know beside the shards; small, so that it travels to any worker."""

    store: str
    columns: ColumnNames
    models: Mapping[str, ModelRef]
    schema: pa.Schema
    batch_size: int
    branches: bool
    device: Device
    precision: Precision
    fail_on_bad_rows: bool
    max_bad_rows: float

    @classmethod
    def of(cls, settings: PipelineSettings, models: Mapping[str, ModelRef], schema: pa.Schema) -> "ReweightSpec":
        """Take from the settings what reweighting depends on."""
        reweight = settings.reweight
        return cls(
            store=settings.store,
            columns=settings.columns,
            models=models,
            schema=schema,
            batch_size=reweight.batch_size,
            branches=reweight.branches,
            device=reweight.device,
            precision=reweight.precision,
            fail_on_bad_rows=reweight.on_bad_rows == "fail",
            max_bad_rows=reweight.max_bad_rows_per_shard,
        )


@dataclass
class ShardResult:
    """The result of one shard: the files written (not yet live), or why there are none."""

    shard: str
    input_digest: str
    files: list[LiveFile] = field(default_factory=list)
    quarantined: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    fault: ShardFault | None = None


def reweight_group(group: Sequence[ShardWork], spec: ReweightSpec) -> list[ShardResult]:
    """Compute the features of a group of shards. A bad shard does not stop the others; it comes back as a fault.

    Raises:
        BadShardError: a row is bad and the settings say to fail.
        BadModelError: a model gives values that are not finite.
        StoreError: the store cannot be written.
        InterruptedRunError: the run was stopped.
    """
    results = []
    for work in group:
        try:
            results.append(reweight_shard(work, spec))
        except BadShardError as error:
            if spec.fail_on_bad_rows:
                raise
            results.append(
                ShardResult(
                    work.shard.key,
                    work.input_digest,
                    fault=ShardFault(shard=work.shard.key, reason=str(error), kept=False),
                )
            )
    return results


def reweight_shard(work: ShardWork, spec: ReweightSpec) -> ShardResult:
    """Compute the features of one shard for every mode in `work.keys`, and its quarantine file.

    Raises:
        BadShardError: the shard breaks the contract, or a bad row was met and the settings say to fail.
    """
    arrow, _ = read_schema(work.shard)
    shard = check_shard(work.shard.key, arrow, spec.columns)
    networks = {mode: _network(spec, mode) for mode in work.keys if mode != RAW}
    result = ShardResult(work.shard.key, work.input_digest)
    reader = _Reader(work, spec, shard, result)
    by_block: dict[int, list[str]] = {}
    for mode in work.keys:
        by_block.setdefault(_block_rows(spec, mode), []).append(mode)
    for pass_number, (rows, modes) in enumerate(sorted(by_block.items())):
        with contextlib.ExitStack() as stack:
            writers = {mode: _Output(stack, spec, work.keys[mode]) for mode in modes}
            for meta, matrix in reader.blocks(rows, record=pass_number == 0):
                for mode in modes:
                    network = networks.get(mode)
                    outputs = (
                        {"front": matrix} if network is None else _apply(network, matrix, spec, mode, work.shard.key)
                    )
                    writers[mode].write(meta, outputs)
            if not still_same(work.shard):
                raise BadShardError(f"shard {work.shard.key}: {work.shard.uri} was rewritten meanwhile; run again.")
            if pass_number == 0:  # before the features appear: where those are, this is
                reader.write_quarantine()
        for mode in modes:
            result.files.append(writers[mode].live())
    return result


class InterruptedRunError(FrontalisError):
    """The run was stopped while this shard was being computed."""


class _Reader:
    """Streams the good rows of a shard: a table of everything but the embedding, and the matrix."""

    def __init__(self, work: ShardWork, spec: ReweightSpec, shard: ShardSchema, result: ShardResult) -> None:
        self.work, self.spec, self.shard, self.result = work, spec, shard, result
        self.dim = next(iter(spec.models.values())).dim
        self.repeats = {
            Reason.DUPLICATE_ID: np.sort(np.array(work.duplicates, np.int64)),
            Reason.ID_COLLISION: np.sort(np.array(work.collisions, np.int64)),
        }
        self.tombstones = Tombstones(Location(spec.store)) if work.forgotten else None
        self.bad: list[pa.RecordBatch] = []
        self.blank_subjects = 0
        self.out_of_range = 0
        self.largest_yaw = 0.0
        self.yaws = 0

    def blocks(self, rows: int, record: bool) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        columns = self.spec.columns
        names = [columns.id, columns.embedding, *(getattr(columns, role) for role in self.shard.present), *columns.keep]
        schema = file_schema(self.spec.schema)
        stop = stopping.get()
        for first, block in stream_blocks(self.work.shard, list(dict.fromkeys(names)), rows):
            if stop is not None and stop.is_set():
                raise InterruptedRunError(
                    f"shard {self.work.shard.key}: the run was stopped; run it again to continue."
                )
            meta = self._meta(first, block, schema, record)
            matrix, reasons = embedding_matrix(block.column(columns.embedding), self.dim)
            keep = self._good_rows(first, meta, reasons, record)
            if keep.all():
                yield meta, matrix
            else:
                yield meta.filter(pa.array(keep)), matrix[keep]
        if record:
            self._refuse_other_length()
            self._refuse_mostly_bad()
            self._warn()

    def write_quarantine(self) -> None:
        if not self.bad:
            return
        table = pa.Table.from_batches(self.bad, schema=file_schema(QUARANTINE_SCHEMA))
        write_quarantine(quarantine_table(Location(self.spec.store)).place / self.work.quarantine, table)

    def _meta(self, first: int, block: pa.RecordBatch, schema: pa.Schema, record: bool) -> pa.RecordBatch:
        names = [item.name for item in schema if item.name not in VECTOR_COLUMNS]
        return pa.RecordBatch.from_arrays(
            [self._column(first, block, schema.field(name), record) for name in names], names
        )

    def _column(self, first: int, block: pa.RecordBatch, item: pa.Field, record: bool) -> pa.Array:
        """Return one column of the features: from the shard where it has it, else null."""
        columns, role = self.spec.columns, item.name
        if role != "id" and role not in self.shard.present and role not in columns.keep:
            return pa.nulls(block.num_rows, item.type)
        name = role if role in columns.keep else getattr(columns, role)
        if role not in ("yaw", "pitch", "roll"):
            column = fitted_column(self.work.shard.key, name, block.column(name), item.type, first)
            if role != "subject":
                return column
            subjects, blank = known_subjects(column)
            self.blank_subjects += blank if record else 0
            return subjects
        array, out_of_range = angle_column(block.column(name))
        if record:
            self.out_of_range += out_of_range
            if role == "yaw":
                self._see_yaw(array)
        return array

    def _good_rows(self, first: int, meta: pa.RecordBatch, reasons: np.ndarray, record: bool) -> np.ndarray:
        """Return which rows are good, and note the others. Forgotten rows leave no trace but their number."""
        ids = meta.column("id")
        for reason, repeated in self.repeats.items():
            at = np.searchsorted(repeated, [first, first + len(reasons)])
            reasons[repeated[at[0] : at[1]] - first] = reason
        if ids.null_count:
            reasons[ids.is_null().to_numpy(zero_copy_only=False)] = Reason.NULL_ID
        good = np.asarray(reasons == None, bool)  # noqa: E711 - elementwise
        gone = np.zeros(len(reasons), bool)
        if self.tombstones is not None:
            gone, _ = self.tombstones.match(ids, meta.column("subject"))
            good &= ~gone
        bad = np.flatnonzero(~good & ~gone)
        if record and bad.size:
            self._quarantine(first, bad, meta.take(pa.array(bad)), [str(reason) for reason in reasons[bad]])
        return good

    def _quarantine(self, first: int, at: np.ndarray, rows: pa.RecordBatch, reasons: list[str]) -> None:
        if self.spec.fail_on_bad_rows:
            raise BadShardError(
                f"shard {self.work.shard.key}, row {first + at[0]} (id {clipped(rows.column('id')[0].as_py())}): "
                f'{reasons[0]}; fix it, or set on_bad_rows = "quarantine".'
            )
        self.result.quarantined.update(reasons)
        values = {
            "row": pa.array(first + at, pa.int64()),
            "id": rows.column("id").cast(pa.string()),
            "subject": rows.column("subject"),
            "reason": pa.array(reasons, pa.string()),
        }
        schema = file_schema(QUARANTINE_SCHEMA)
        self.bad.append(pa.RecordBatch.from_arrays([values[item.name] for item in schema], schema=schema))

    def _refuse_other_length(self) -> None:
        """A shard of lists says nothing of their length; where no row has the right one, it is of another model."""
        if self.work.rows and self.result.quarantined[Reason.WRONG_LENGTH] == self.work.rows:
            raise BadShardError(
                f"shard {self.work.shard.key}: column {self.spec.columns.embedding!r} has no row of {self.dim} "
                "numbers, which the models want; pass models trained on such embeddings."
            )

    def _refuse_mostly_bad(self) -> None:
        """Refuse a shard of which too many rows are bad; ids that other rows have are no damage of the shard."""
        found = {reason: rows for reason, rows in self.result.quarantined.items() if reason not in self.repeats}
        bad, rows = sum(found.values()), self.work.rows
        if bad >= FEWEST_BAD_ROWS and bad > self.spec.max_bad_rows * rows:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(found.items()))
            raise BadShardError(
                f"shard {self.work.shard.key}: {bad:,} of {rows:,} rows are bad ({reasons}); write it again, or raise "
                "[reweight] max_bad_rows_per_shard."
            )

    def _see_yaw(self, yaw: pa.Array) -> None:
        values = yaw.drop_null().to_numpy(zero_copy_only=False)
        self.yaws += len(values)
        if len(values):
            self.largest_yaw = max(self.largest_yaw, float(np.abs(values).max()))

    def _warn(self) -> None:
        if self.blank_subjects:
            self.result.warnings.append(
                f"shard {self.work.shard.key}: {self.blank_subjects:,} blank subjects are unknown now"
            )
        if self.out_of_range:
            self.result.warnings.append(
                f"shard {self.work.shard.key}: {self.out_of_range} angles outside ±180° or not finite are unknown now"
            )
        if self.yaws >= RADIANS_ROWS and 0 < self.largest_yaw < RADIANS_BELOW:
            self.result.warnings.append(
                f"shard {self.work.shard.key}: no |yaw| exceeds {self.largest_yaw:.2f}; degrees are wanted, these look "
                "like radians"
            )


class _Output:
    """One feature file on its way to its final name."""

    def __init__(self, stack: contextlib.ExitStack, spec: ReweightSpec, key: FeatureKey) -> None:
        self.key = key
        self.schema = file_schema(spec.schema)
        self.place = features_table(Location(spec.store)).place / key.path
        file = stack.enter_context(self.place.writing())
        self.writer = stack.enter_context(parquet_writer(file, self.schema))
        self.rows = 0

    def write(self, meta: pa.RecordBatch, vectors: Mapping[str, np.ndarray]) -> None:
        n = meta.num_rows
        if not n:
            return
        columns = {name: meta.column(name) for name in meta.schema.names}
        for name in VECTOR_COLUMNS:
            columns[name] = vector_column(vectors[name]) if name in vectors else pa.nulls(n, VECTOR)
        table = pa.Table.from_arrays([columns[item.name] for item in self.schema], schema=self.schema)
        self.writer.write_table(table, row_group_size=max(n, BLOCK_ROWS))
        self.rows += n

    def live(self) -> LiveFile:
        size = self.place.size()
        assert size is not None
        return LiveFile(self.key.path, size, self.rows, {"mode": self.key.mode, "shard": self.key.shard})


def _apply(network: Reweighter, matrix: np.ndarray, spec: ReweightSpec, mode: str, shard: str) -> dict[str, np.ndarray]:
    try:
        return network(matrix, branches=spec.branches and network.has_branches)
    except BadModelError as error:
        raise BadModelError(f"shard {shard}, mode {mode}: {error}") from error


def _block_rows(spec: ReweightSpec, mode: str) -> int:
    model = spec.models.get(mode)
    return spec.batch_size if model is not None and uses_batch(mode, model.statistic) else BLOCK_ROWS


def _network(spec: ReweightSpec, mode: str) -> Reweighter:
    return _reweighter(spec.store, spec.models[mode], spec.device, spec.precision)


@functools.lru_cache(maxsize=8)
def _reweighter(store: str, model: ModelRef, device: Device, precision: Precision) -> Reweighter:
    return Reweighter(stored_checkpoint(Location(store), model), model.statistic, device, precision)


@contextlib.contextmanager
def one_thread_each(workers: int) -> Iterator[None]:
    """Give every worker thread of this process one torch thread while several work side by side.

    On a shared machine that is as fast as OpenMP threads when it is quiet and several times faster when it is not.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(workers, 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
