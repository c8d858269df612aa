"""Erase: take forgotten rows out of features and quarantine, without the source.

A file that holds a forgotten row is written again from the store itself, under the name that the next plan would give
it, so that the next run finds nothing to do. The manifest is brought up to date. Old versions keep the rows until
`tasks.maintenance.vacuum`; indexes, metrics and the release are left to `tasks.maintenance.forget`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.inference import Reweighter
from schemas.features import (
    BLOCK_ROWS,
    QUARANTINE_SCHEMA,
    VECTOR_COLUMNS,
    FeatureKey,
    file_schema,
    input_digest,
)
from schemas.metrics import RAW
from schemas.models import uses_batch
from schemas.releases import ModelRef, Release
from schemas.settings import ColumnNames
from storage.features import (
    check_files,
    complete_rows,
    features_table,
    matrix_of,
    opened,
    parquet_writer,
    quarantine_table,
    read_table,
    vector_column,
    write_quarantine,
)
from storage.ids import id_keys
from storage.location import Location
from storage.manifest import NO_KEY, Manifest, RowKeys, mark_repeats
from storage.tables import NO_TABLE, FileTable, LiveFile, Snapshot
from storage.tombstones import Tombstones
from tasks.checkpoints import stored_checkpoint
from tasks.maintenance.forgotten_rows import Hits, find_forgotten
from tasks.plan import manifest_basis


@dataclass(frozen=True)
class Erased:
    """The two tables after erasing, and how many rows left each."""

    features: Snapshot
    quarantine: Snapshot
    rows: int
    quarantined: int
    shards: int


def erase(store: Location, served: Release | None, tombstones: Tombstones, columns: ColumnNames) -> Erased:
    """Commit tables with the rows of the served release, without the forgotten ones.

    Where nothing is served, what is live takes its place. Work that was committed but never served leaves the tables;
    the next run finds its files by name.

    Args:
        store: the store.
        served: the release that is served.
        tombstones: all of them.
        columns: those of the source, as the manifest was taken with.

    Raises:
        StoreBusyError: another run committed meanwhile.
        StoreError: a file is damaged.
    """
    features, quarantine = features_table(store), quarantine_table(store)
    live, live_quarantine = features.snapshot(), quarantine.snapshot()
    shown = features.snapshot(served.features_version) if served else live
    shown_quarantine = _quarantine_of(quarantine, served) if served else live_quarantine
    hits = find_forgotten(store, shown, shown_quarantine, tombstones)
    manifest = _UpdatedManifest(Manifest(store).load(), columns, tombstones)
    if not hits and (served is None or not find_forgotten(store, live, live_quarantine, tombstones)):
        manifest.save({file.shard: file for file in live.of_mode(RAW)})
        return Erased(live, live_quarantine, rows=0, quarantined=0, shards=0)
    models = served.models if served else {}
    files, quarantine_files = dict(shown.files), dict(shown_quarantine.files)
    for shard, one in sorted(hits.items()):
        of_shard = {file.mode: file for file in shown.of_shard(shard)}
        check_files(features, of_shard.values())
        digest = manifest.forget(shard, one, _input_of(of_shard, shard))
        for mode, file in of_shard.items():
            new = _rewrite(store, of_shard, mode, digest, models, tombstones)
            del files[file.path]
            files[new.path] = new
        for file in shown_quarantine.of_shard(shard):
            kept = _rewrite_quarantine(quarantine, quarantine_files.pop(file.path), digest, one.quarantined)
            if kept is not None:
                quarantine_files[kept.path] = kept
    after_quarantine = _replace(
        quarantine, live_quarantine, quarantine_files
    )  # before the features, as in `tasks.publish`
    after = _replace(features, live, files)
    manifest.save({file.shard: file for file in after.of_mode(RAW)})
    return Erased(
        after,
        after_quarantine,
        rows=sum(len(one.ids) for one in hits.values()),
        quarantined=sum(len(one.quarantined) for one in hits.values()),
        shards=len(hits),
    )


class _UpdatedManifest:
    """The manifest as the next run would leave it, as far as the store knows the source."""

    def __init__(self, manifest: Manifest, columns: ColumnNames, tombstones: Tombstones) -> None:
        self.manifest = manifest
        self.records = dict(manifest.records)
        # A record may be older than the last entries: where forgetting was interrupted, or the shard went bad.
        self.bases = {manifest_basis(columns, digest) for digest in tombstones.digests()}
        self.basis, self.marks = manifest_basis(columns, tombstones.digest), tombstones.marks
        self.keys: dict[str, RowKeys] = {}

    def forget(self, shard: str, hits: Hits, known_input: str) -> str:
        """Take rows out of a shard's record, and return the input digest of what is left.

        Where the record does not describe what is stored, the digest is one that no plan asks for: the next run
        computes the shard again.
        """
        record = self.records.get(shard)
        keys = self.manifest.row_keys(record) if record is not None else None
        if record is None or keys is None or record.input_digest != known_input:
            self.records.pop(shard, None)
            return input_digest(known_input, (), hits.marks)
        repeats = {*record.duplicates, *record.collisions}
        owners = np.flatnonzero(np.isin(keys.keys, id_keys(hits.ids))) if len(hits.ids) else np.zeros(0, np.int64)
        at = sorted({*(int(row) for row in owners if row not in repeats), *hits.quarantined})
        left = [row for row in record.duplicates if row not in at]
        record = replace(
            record,
            duplicates=left,
            collisions=[row for row in record.collisions if row not in at],
            forgotten=sorted({*record.forgotten, *hits.marks}),
            forgotten_rows=record.forgotten_rows + hits.rows,
        )
        without = RowKeys(keys.keys.copy(), keys.checks.copy())
        without.keys[at] = without.checks[at] = NO_KEY
        self.records[shard], self.keys[shard] = record, without
        return record.input_digest

    def save(self, live: Mapping[str, LiveFile]) -> None:
        """Keep records that describe a live file, under the new basis; the next run reads the other shards."""
        kept = {
            shard: record
            for shard, record in self.records.items()
            if record.basis in self.bases
            and self.marks.issuperset(record.forgotten)  # rows whose tombstone was lifted come back
            and shard in live
            and record.input_digest == _input_of({RAW: live[shard]}, shard)
        }
        keys = {shard: self.keys.get(shard) or self.manifest.row_keys(record) for shard, record in kept.items()}
        whole = {shard: one for shard, one in keys.items() if one is not None}
        kept = {shard: replace(kept[shard], basis=self.basis) for shard in whole}
        for shard, record in kept.items():
            self.manifest.write_keys(record, whole[shard].keys, whole[shard].checks)
        self.manifest.save(mark_repeats(kept, whole))


def _rewrite(
    store: Location,
    of_shard: Mapping[str, LiveFile],
    mode: str,
    digest: str,
    models: Mapping[str, ModelRef],
    tombstones: Tombstones,
) -> LiveFile:
    """Write the rows of a feature file that stay, block by block as `tasks.reweight` would, under its new name."""
    table, file = features_table(store), of_shard[mode]
    key = replace(FeatureKey.parse(file.path), input=digest)
    place = table.place / key.path
    rows = complete_rows(place) if place.size() is not None else None
    if rows is None:
        by_batch = mode in models and uses_batch(mode, models[mode].statistic)
        rows = 0
        with place.writing() as target, opened(table, file) as source:
            schema = source.schema_arrow
            raw = _Blocks(table, of_shard[RAW]) if by_batch else None
            network = _network(store, models[mode]) if by_batch else None
            with parquet_writer(target, schema) as writer:
                for number in range(source.num_row_groups):
                    block = source.read_row_group(number)
                    gone, _ = tombstones.match(block["id"].combine_chunks(), block["subject"].combine_chunks())
                    embeddings = raw.take(block.num_rows) if raw is not None else None
                    if gone.any():
                        block = block.filter(pa.array(~gone))
                        if network is not None and embeddings is not None:
                            block = _with_vectors(block, network, embeddings[~gone])
                    if block.num_rows:
                        writer.write_table(block, row_group_size=max(block.num_rows, BLOCK_ROWS))
                        rows += block.num_rows
    size = place.size()
    assert size is not None
    return LiveFile(key.path, size, rows, file.partitions)


def _with_vectors(block: pa.Table, network: Reweighter, embeddings: np.ndarray) -> pa.Table:
    """Replace the features of a block whose batch statistic has changed."""
    branches = network.has_branches and block["identity"].null_count < block.num_rows
    vectors = network(np.ascontiguousarray(embeddings), branches=branches) if len(embeddings) else {}
    for name in VECTOR_COLUMNS:
        if name in vectors:
            at = block.schema.get_field_index(name)
            column = vector_column(vectors[name]).cast(block.schema.field(at).type)
            block = block.set_column(at, block.schema.field(at), column)
    return block


class _Blocks:
    """The embeddings of a shard, from its raw features, cut into blocks of any size."""

    def __init__(self, table: FileTable, file: LiveFile) -> None:
        self.parts = self._stream(table, file)
        self.rest = np.zeros((0, 0), np.float32)

    def take(self, rows: int) -> np.ndarray:
        """Return the next `rows` embeddings."""
        parts = [self.rest] if len(self.rest) else []
        while sum(map(len, parts)) < rows:
            parts.append(next(self.parts))
        whole = np.concatenate(parts)
        self.rest = whole[rows:]
        return whole[:rows]

    @staticmethod
    def _stream(table: FileTable, file: LiveFile) -> Iterator[np.ndarray]:
        with opened(table, file) as source:
            for batch in source.iter_batches(columns=["front"]):
                yield matrix_of(batch.column("front"), file.path)


def _rewrite_quarantine(table: FileTable, file: LiveFile, digest: str, gone: Sequence[int]) -> LiveFile | None:
    """Write the quarantined rows of a shard that stay under their new name; None where none is left."""
    rows = read_table(table, [file], ["row", "id", "subject", "reason"])
    rows = rows.filter(pc.invert(pc.is_in(rows["row"], pa.array(gone, pa.int64())))).combine_chunks()
    if not rows.num_rows:
        return None
    path = replace(FeatureKey.parse(file.path), input=digest).quarantine_path
    rows = rows.cast(file_schema(QUARANTINE_SCHEMA))
    write_quarantine(table.place / path, rows)
    size = (table.place / path).size()
    assert size is not None
    return LiveFile(path, size, rows.num_rows, file.partitions)


def _replace(table: FileTable, live: Snapshot, files: Mapping[str, LiveFile]) -> Snapshot:
    schema = table.schema()
    if schema is None:  # no table: nothing was ever in quarantine
        return live
    add = [file for path, file in files.items() if path not in live.files]
    return table.commit(live, schema, add, [file for path, file in live.files.items() if path not in files])


def _network(store: Location, model: ModelRef) -> Reweighter:
    return Reweighter(stored_checkpoint(store, model), statistic=model.statistic)


def _quarantine_of(table: FileTable, release: Release) -> Snapshot:
    return NO_TABLE if release.quarantine_version is None else table.snapshot(release.quarantine_version)


def _input_of(of_shard: Mapping[str, LiveFile], shard: str) -> str:
    """Return the input digest in the name of a shard's raw feature file; one that no shard has where it has none."""
    return FeatureKey.parse(of_shard[RAW].path).input if RAW in of_shard else f"none of {shard}"
