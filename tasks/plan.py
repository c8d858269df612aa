"""Plan: what a run has to do, as a set difference.

Wanted file names (from the manifest of the source and the model digests) minus names that are live is work; live minus
wanted are removals; a wanted file that is complete in its place already is reused. Nothing else records the
progress of a run. Computing is left to `tasks.reweight`, committing to `tasks.publish`.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pyarrow as pa

from models.checkpoint import inference_options, load, model_digest
from schemas.errors import BadModelError, BadShardError, SettingsError
from schemas.features import FILE_FORMAT, FeatureKey, digest_of, feature_schema
from schemas.metrics import RAW, measured_modes
from schemas.releases import ModelRef
from schemas.reports import ShardFault
from schemas.settings import ColumnNames, PipelineSettings
from schemas.shards import check_shard
from storage.features import complete_rows, feature_keys, features_table, quarantine_table, read_table
from storage.ids import id_checks, id_keys
from storage.layout import model_path
from storage.location import Location
from storage.manifest import Manifest, RowKeys, ShardRecord, find_misfits, mark_repeats
from storage.shards import Shard, find_shards, read_schema
from storage.tables import FileTable, LiveFile, Snapshot
from storage.tombstones import Tombstones
from tasks.maintenance.forgotten_rows import why_not_kept


@dataclass(frozen=True)
class ShardWork:
    """One shard to read, the keys (by mode) of the feature files to write from it, and the file for its bad rows."""

    shard: Shard
    input_digest: str
    rows: int
    duplicates: tuple[int, ...]
    collisions: tuple[int, ...]
    forgotten: bool
    keys: Mapping[str, FeatureKey]
    quarantine: str


@dataclass(frozen=True)
class Plan:
    """A run, before anything is computed.

    `wanted` are the feature files that shall be live, by path. `source_version` is that of a Delta table as source.
    """

    base: Snapshot
    schema: pa.Schema
    records: Mapping[str, ShardRecord]
    inputs: Mapping[str, str]
    models: Mapping[str, ModelRef]
    wanted: Mapping[str, FeatureKey]
    reused: Sequence[LiveFile]
    groups: Sequence[Sequence[ShardWork]]
    faults: Sequence[ShardFault] = field(default_factory=list)
    source_version: int | None = None

    @property
    def modes(self) -> list[str]:
        """The modes of the run, raw first."""
        return measured_modes(self.models)

    @property
    def work(self) -> list[ShardWork]:
        """All shards that have something to compute."""
        return [work for group in self.groups for work in group]


def prepare_models(settings: PipelineSettings) -> dict[str, ModelRef]:
    """Check every checkpoint against its mode and keep a copy in the store, named by its digest.

    Raises:
        BadModelError: a file is no checkpoint, was trained for another mode, or for another length than its companion.
        SettingsError: the file does not exist.
    """
    store = Location(settings.store)
    models: dict[str, ModelRef] = {}
    for mode, uri in settings.models.items():
        place = Location(uri)
        try:
            content = place.read_bytes()
        except FileNotFoundError as error:
            raise SettingsError(f"model {mode}={uri}: there is no such file; `frontalis train` makes one.") from error
        checkpoint = load(content, name=f"model {mode}={uri}")
        if checkpoint.card.mode != mode:
            raise BadModelError(
                f"model {mode}={uri}: was trained for {checkpoint.card.mode}; pass it as {checkpoint.card.mode}={uri}."
            )
        reweight = settings.reweight
        options = {
            **inference_options(checkpoint.card, reweight.statistic, reweight.batch_size, reweight.precision),
            "output": output_options(settings),
        }
        copy = model_path(checkpoint.file_digest)
        if (store / copy).size() != len(content):
            (store / copy).write_bytes(content)
        models[mode] = ModelRef(
            path=copy,
            file_digest=checkpoint.file_digest,
            digest=model_digest(checkpoint.file_digest, options),
            statistic=reweight.statistic,
            dim=checkpoint.card.embedding_dim,
        )
    dims = {mode: model.dim for mode, model in models.items()}
    if len(set(dims.values())) > 1:
        raise BadModelError(f"the models want embeddings of different length ({dims}); train them on the same source.")
    return models


def output_options(settings: PipelineSettings) -> dict[str, object]:
    """Return the settings, beside the model, that decide the bytes of a feature file."""
    return {**_row_options(settings), "branches": settings.reweight.branches}


def raw_digest(settings: PipelineSettings, dim: int) -> str:
    """Return what stands for the model digest in the file names of mode `raw`: all that decides which rows are good."""
    return model_digest(RAW, {"dim": dim, "output": _row_options(settings)})


def _row_options(settings: PipelineSettings) -> dict[str, object]:
    return {"columns": settings.columns.model_dump(mode="json"), "file": FILE_FORMAT}


def make_plan(
    settings: PipelineSettings, models: Mapping[str, ModelRef], unreadable: Sequence[ShardFault] = ()
) -> Plan:
    """Compare the source with the store.

    Args:
        settings: of the run.
        models: by mode, from `prepare_models`.
        unreadable: shards that turned out bad while this run read them.

    Raises:
        SettingsError: the source is missing, empty, or holds no row.
        BadShardError: no shard at all can be used.
    """
    store = Location(settings.store)
    table = features_table(store)
    base = table.snapshot()
    known = table.schema()
    manifest = Manifest(store).load()
    shards = find_shards(Location(settings.source), settings.columns)
    dim = next(iter(models.values())).dim
    tombstones = Tombstones(store)
    contract = Contract(settings.columns, tombstones, dim, None if known is None else _id_type(known))
    digests = {RAW: raw_digest(settings, dim), **{mode: model.digest for mode, model in models.items()}}
    bad = {fault.shard: BadShardError(fault.reason) for fault in unreadable}
    records, errors, keys_of = count_shards(manifest, shards, contract, bad)
    faults, kept = [], dict[str, list[FeatureKey]]()
    for shard, error in sorted(errors.items()):
        last_good, why_not = _last_good(store, base, shard, digests, tombstones)
        reason = f"{error} {why_not}" if why_not else str(error)
        faults.append(ShardFault(shard=shard, reason=reason, kept=bool(last_good)))
        if last_good:
            kept[shard] = last_good
    usable = {key: record for key, record in records.items() if key not in errors}
    if not usable and not kept:
        what = next(iter(errors.values()))
        raise BadShardError(f"source {settings.source}: no row can be used, so nothing was published: {what}")
    if errors or records != manifest.records:
        owned = {shard: _stored_keys(table, base, keys) for shard, keys in kept.items()}
        usable = mark_repeats(usable, keys_of, owned)
        records |= usable
    if not unreadable:  # the next run reads them again, and they may be good then
        manifest.save(records)
    inputs = {key: record.input_digest for key, record in usable.items() if record.rows}
    if not inputs and not kept:
        raise SettingsError(f"source {settings.source}: its {len(usable)} shards hold no row.")
    keys = [FeatureKey(mode, shard, inputs[shard], model) for shard in inputs for mode, model in digests.items()]
    reused, missing = _find_reusable(store, base, keys, records)
    found = {shard.key: shard for shard in shards}
    work = [
        ShardWork(
            shard=found[shard],
            input_digest=inputs[shard],
            rows=records[shard].rows,
            duplicates=tuple(records[shard].duplicates),
            collisions=tuple(records[shard].collisions),
            forgotten=bool(records[shard].forgotten),
            keys={key.mode: key for key in lacking},
            quarantine=FeatureKey(RAW, shard, inputs[shard], digests[RAW]).quarantine_path,
        )
        for shard, lacking in _by_shard(missing).items()
    ]
    return Plan(
        base=base,
        schema=_schema(known, settings.columns, [found[key] for key in sorted(usable)]),
        records=records,
        inputs=inputs | {shard: keys[0].input for shard, keys in kept.items()},
        models=dict(models),
        wanted={key.path: key for key in [*keys, *(key for some in kept.values() for key in some)]},
        reused=reused,
        groups=group_work(work, settings.reweight.group_rows, settings.runner.workers or os.cpu_count() or 1),
        faults=faults,
        source_version=shards[0].version,
    )


def _last_good(
    store: Location, base: Snapshot, shard: str, digests: Mapping[str, str], tombstones: Tombstones
) -> tuple[list[FeatureKey], str | None]:
    """Return the live files of a bad shard, one a mode, if they can stay; else none, and where there are some, why not.

    Those of another model cannot stand beside the new ones.
    """
    place = features_table(store).place
    keys = [key for key in feature_keys(base) if key.shard == shard and digests.get(key.mode) == key.model]
    if len(keys) != len(digests) or any((place / key.path).size() != base.files[key.path].size for key in keys):
        return [], None
    why_not = why_not_kept(store, shard, [key.path for key in keys], tombstones)
    return ([], why_not) if why_not else (keys, None)


def _stored_keys(table: FileTable, base: Snapshot, keys: Sequence[FeatureKey]) -> RowKeys:
    """Return the row keys of the features of a shard."""
    files = [base.files[key.path] for key in keys if key.mode == RAW]
    ids = read_table(table, files, ["id"])["id"].combine_chunks()
    return RowKeys(id_keys(ids), id_checks(ids))


@dataclass(frozen=True)
class Contract:
    """What every shard of a run must satisfy; `id_type` is that of the store, None for a new one."""

    columns: ColumnNames
    tombstones: Tombstones
    dim: int
    id_type: str | None


def count_shards(
    manifest: Manifest, shards: Sequence[Shard], contract: Contract, bad: Mapping[str, BadShardError]
) -> tuple[dict[str, ShardRecord], dict[str, BadShardError], dict[str, RowKeys]]:
    """Return what is known of every shard, the error of every bad one, and the row keys of the others.

    A shard that has not changed since the last run is not opened. A bad shard keeps the record of the last run, if
    there is one, changed so that the next run reads it again. Where nothing has changed and nothing is bad, there are
    no row keys.

    Args:
        manifest: of the last run.
        shards: of the source.
        contract: what they must satisfy.
        bad: shards that are known to be bad.
    """
    columns, tombstones = contract.columns, contract.tombstones
    basis = manifest_basis(columns, tombstones.digest)
    forget = tombstones.match if tombstones else None
    found = {shard.key: shard for shard in shards}
    errors = {key: error for key, error in bad.items() if key in found}

    def count(shard: Shard) -> ShardRecord | BadShardError:
        try:
            return manifest.count(shard, columns, basis, forget)
        except BadShardError as error:
            return error

    def count_all(some: Iterable[Shard]) -> dict[str, ShardRecord]:
        wanted = [shard for shard in some if shard.key not in errors]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            seen = dict(zip((shard.key for shard in wanted), pool.map(count, wanted), strict=True))
        errors.update({key: error for key, error in seen.items() if isinstance(error, BadShardError)})
        return {key: record for key, record in seen.items() if isinstance(record, ShardRecord)}

    before = {key: record for key, record in manifest.records.items() if key in found}
    unchanged = {key: record for key, record in before.items() if record.describes(found[key], basis)}
    records = unchanged | count_all(shard for shard in shards if shard.key not in unchanged)
    records = {key: record for key, record in records.items() if key not in errors}
    errors |= find_misfits(records, columns, contract.dim, contract.id_type)
    keys: dict[str, RowKeys | None] = {}
    if errors or records != manifest.records:
        keys = {key: manifest.row_keys(record) for key, record in records.items() if key not in errors}
        lost = count_all([found[key] for key, row_keys in keys.items() if row_keys is None])
        records |= lost
        keys |= {key: manifest.row_keys(record) for key, record in lost.items()}
    last = {key: replace(before[key], basis="") for key in errors if key in before}
    return (
        {key: record for key, record in records.items() if key not in errors} | last,
        errors,
        {key: row_keys for key, row_keys in keys.items() if row_keys is not None and key not in errors},
    )


def manifest_basis(columns: ColumnNames, tombstones: str) -> str:
    """Return the digest of what a manifest record depends on beside the file: columns, and the list of tombstones."""
    return digest_of(columns.model_dump_json().encode(), tombstones.encode())[:12]


def group_work(work: Sequence[ShardWork], group_rows: int, workers: int) -> list[list[ShardWork]]:
    """Cut the work into groups of about `group_rows` rows, smaller where that keeps every worker busy to the end.

    One task a group keeps orchestration cheap; four groups a worker keep the tail short.
    """
    total = sum(item.rows for item in work)
    limit = min(group_rows, max(1, total // (4 * workers)))
    groups: list[list[ShardWork]] = []
    size = limit
    for item in work:
        if size >= limit:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.rows
    return groups


def _find_reusable(
    store: Location, base: Snapshot, wanted: Iterable[FeatureKey], records: Mapping[str, ShardRecord]
) -> tuple[list[LiveFile], list[FeatureKey]]:
    """Separate wanted files that are complete on disk, though not live yet, from those to compute.

    A shard that was renamed has its file under the old name: equal digests mean equal bytes, so it is copied. A shard
    of which rows are neither features nor in quarantine is computed again.
    """
    wanted = list(wanted)
    place, quarantine = features_table(store).place, quarantine_table(store).place
    bad_rows = _quarantined_rows(store, {key.quarantine_path for key in wanted if key.mode == RAW})
    on_disk = {entry.name: entry.size for entry in place.files(".parquet")}
    by_digests = {(key.mode, key.input, key.model): key for key in feature_keys(base)}
    reused, missing = [], []
    for key in wanted:
        live = base.files.get(key.path)
        if live is not None and on_disk.get(key.path) == live.size:
            if key.mode == RAW and records[key.shard].unaccounted(live.rows, bad_rows.get(key.quarantine_path, 0)):
                missing.append(key)
            continue
        twin = by_digests.get((key.mode, key.input, key.model))
        if (
            live is None
            and key.path not in on_disk
            and twin is not None
            and on_disk.get(twin.path) == base.files[twin.path].size
        ):
            if key.mode == RAW and (quarantine / twin.quarantine_path).exists():
                (quarantine / twin.quarantine_path).copy_to(quarantine / key.quarantine_path)
                bad_rows[key.quarantine_path] = complete_rows(quarantine / key.quarantine_path) or 0
            (place / twin.path).copy_to(place / key.path)
            on_disk[key.path] = on_disk[twin.path]
        rows = complete_rows(place / key.path) if live is None and key.path in on_disk else None
        lost = key.mode == RAW and records[key.shard].unaccounted(rows or 0, bad_rows.get(key.quarantine_path, 0))
        if rows is None or lost:
            missing.append(key)
        else:
            reused.append(LiveFile(key.path, on_disk[key.path], rows, {"mode": key.mode, "shard": key.shard}))
    return reused, missing


def _quarantined_rows(store: Location, wanted: Collection[str]) -> dict[str, int]:
    """Return how many rows are in each wanted quarantine file that is complete on disk."""
    table = quarantine_table(store)
    live = table.snapshot().files
    rows = {}
    for entry in table.place.files(".parquet"):
        if entry.name in wanted:
            file = live.get(entry.name)
            known = file.rows if file is not None and file.size == entry.size else None
            rows[entry.name] = (complete_rows(table.place / entry.name) or 0) if known is None else known
    return rows


def _by_shard(keys: Iterable[FeatureKey]) -> dict[str, list[FeatureKey]]:
    shards: dict[str, list[FeatureKey]] = {}
    for key in keys:
        shards.setdefault(key.shard, []).append(key)
    return shards


def _id_type(schema: pa.Schema) -> str:
    return "int64" if pa.types.is_integer(schema.field("id").type) else "string"


def _schema(known: pa.Schema | None, columns: ColumnNames, readable: Sequence[Shard]) -> pa.Schema:
    """Return the schema of the features: that of the store, with new kept columns typed as in the first shard."""
    if known is not None and (not readable or all(name in known.names for name in columns.keep)):
        return known
    first = readable[0]
    shard = check_shard(first.key, read_schema(first)[0], columns)
    wanted = feature_schema(shard.id_type, shard.keep)
    if known is None:
        return wanted
    return pa.schema([*known, *(field for field in wanted if field.name not in known.names)])
