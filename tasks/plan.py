"""Plan: what a run has to do, as a set difference.

Wanted file names (from the census of the source and the model digests) minus names that are live is work; live minus
wanted are removals; a wanted file that lies complete in its place already is reused. Nothing else remembers how far a
run has come. Computing is left to `tasks.reweight`, committing to `tasks.publish`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from models.checkpoint import inference_options, load, model_digest
from schemas.errors import BadModelError, BadShardError, SettingsError
from schemas.features import digest_of, feature_path, feature_schema, input_digest
from schemas.releases import ModelRef
from schemas.reports import RAW, ShardFault
from schemas.settings import ColumnNames, PipelineSettings
from schemas.shards import check_shard
from storage.census import CENSUS, Census, Entry, mark_repeats, one_id_type
from storage.features import complete_rows, features_table
from storage.location import Location
from storage.shards import Shard, find_shards, read_schema
from storage.tables import LiveFile, Snapshot, Table
from storage.tombstones import Tombstones

MODELS = "models"


@dataclass(frozen=True)
class ShardWork:
    """One shard to read, and the feature files (by mode) to write from it."""

    shard: Shard
    input_digest: str
    rows: int
    duplicates: tuple[int, ...]
    collisions: tuple[int, ...]
    forgotten: bool
    paths: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """A run, before anything is computed. `wanted` maps each file name to its (mode, shard)."""

    base: Snapshot
    schema: pa.Schema
    entries: Mapping[str, Entry]
    inputs: Mapping[str, str]
    models: Mapping[str, ModelRef]
    wanted: Mapping[str, tuple[str, str]]
    reused: Sequence[LiveFile]
    groups: Sequence[Sequence[ShardWork]]
    faults: Sequence[ShardFault] = field(default_factory=list)

    @property
    def modes(self) -> list[str]:
        """The modes of the run, raw first."""
        return [RAW, *sorted(self.models, reverse=True)]

    @property
    def work(self) -> list[ShardWork]:
        """All shards that have something to compute."""
        return [work for group in self.groups for work in group]


def prepare_models(settings: PipelineSettings) -> dict[str, ModelRef]:
    """Check every checkpoint against its mode and keep a copy in the store, named by its digest.

    Raises:
        BadModelError: a file is no checkpoint, or was trained for another mode.
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
        checkpoint = load(content)
        if checkpoint.card.mode != mode:
            raise BadModelError(
                f"model {mode}={uri}: was trained for {checkpoint.card.mode}; pass it as {checkpoint.card.mode}={uri}."
            )
        reweight = settings.reweight
        options = {
            **inference_options(checkpoint.card, reweight.statistic, reweight.batch_size),
            "output": output_options(settings),
        }
        copy = f"{MODELS}/{checkpoint.file_digest}.safetensors"
        if (store / copy).size() != len(content):
            (store / copy).write_bytes(content)
        models[mode] = ModelRef(
            path=copy,
            file_digest=checkpoint.file_digest,
            digest=model_digest(checkpoint.file_digest, options),
            statistic=reweight.statistic,
        )
    return models


def output_options(settings: PipelineSettings) -> dict[str, object]:
    """Return the settings, beside the model, that decide the bytes of a feature file."""
    return {"columns": settings.columns.model_dump(mode="json"), "branches": settings.reweight.branches}


def raw_digest(settings: PipelineSettings) -> str:
    """Return what stands for the model digest in the file names of mode `raw`."""
    return model_digest(RAW, {"output": {"columns": output_options(settings)["columns"]}})


def make_plan(settings: PipelineSettings, models: Mapping[str, ModelRef]) -> Plan:
    """Compare the source with the store.

    Raises:
        SettingsError: the source is missing or empty, or a kept column contradicts the store.
        BadShardError: no shard at all can be used, or `on_bad_rows = "fail"` and ids repeat.
    """
    store = Location(settings.store)
    table = features_table(store)
    base = table.snapshot()
    tombstones = Tombstones(store)
    census = Census(store / CENSUS).load()
    shards = find_shards(settings.source)
    entries, errors = take_census(census, shards, settings.columns, tombstones)
    known_type = _id_type(table)
    by_type = one_id_type([entries[key] for key in sorted(entries)], known_type)
    errors |= by_type
    usable = {key: entry for key, entry in entries.items() if key not in by_type}
    if not usable and not base.files:
        raise next(iter(errors.values()))
    census.save(usable)
    digests = {RAW: raw_digest(settings), **{mode: model.digest for mode, model in models.items()}}
    inputs = {
        key: input_digest(entry.content, [*entry.duplicates, *entry.collisions], entry.forgotten)
        for key, entry in usable.items()
        if entry.rows
    }
    wanted = {
        feature_path(mode, key, inputs[key], digest): (mode, key) for key in inputs for mode, digest in digests.items()
    }
    found = {shard.key: shard for shard in shards}
    faults = []
    for key, error in sorted(errors.items()):
        last_good = [path for path, (_, shard) in wanted.items() if shard == key]
        kept = bool(last_good) and all(path in base.files for path in last_good)
        faults.append(ShardFault(shard=key, reason=str(error), kept=kept))
        if not kept:  # those of another model cannot stand beside the new ones
            wanted = {path: where for path, where in wanted.items() if where[1] != key}
            inputs.pop(key, None)
    on_disk = {entry.name: entry.size for entry in table.place.files(".parquet")}
    reused, missing = _sort_out(table, base, wanted, on_disk)
    work = [
        ShardWork(
            shard=found[key],
            input_digest=inputs[key],
            rows=usable[key].rows,
            duplicates=tuple(usable[key].duplicates),
            collisions=tuple(usable[key].collisions),
            forgotten=bool(usable[key].forgotten),
            paths={mode: path for path, (mode, _) in paths.items()},
        )
        for key, paths in _by_shard(missing, wanted).items()
        if key not in errors
    ]
    return Plan(
        base=base,
        schema=_schema(table, settings, usable, found),
        entries=usable,
        inputs=inputs,
        models=dict(models),
        wanted=wanted,
        reused=reused,
        groups=group_work(work, settings.reweight.group_rows, settings.runner.workers or os.cpu_count() or 1),
        faults=faults,
    )


def take_census(
    census: Census, shards: Sequence[Shard], columns: ColumnNames, tombstones: Tombstones
) -> tuple[dict[str, Entry], dict[str, BadShardError]]:
    """Return the entry of every readable shard and the error of every other one.

    A shard that has not changed since the last run is not opened. A bad shard keeps its last good entry, so that its
    features stay as they are.
    """
    basis = census_basis(columns, tombstones)
    forget = tombstones.match if tombstones else None
    known = {
        shard.key: census.entries[shard.key]
        for shard in shards
        if shard.key in census.entries and census.entries[shard.key].describes(shard, basis)
    }
    changed = [shard for shard in shards if shard.key not in known]
    errors: dict[str, BadShardError] = {}
    fresh: dict[str, Entry] = {}

    def look(shard: Shard) -> Entry | BadShardError:
        try:
            return census.count(shard, columns, basis, forget)
        except BadShardError as error:
            return error

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for shard, seen in zip(changed, pool.map(look, changed), strict=True):
            if isinstance(seen, BadShardError):
                errors[shard.key] = seen
                if shard.key in census.entries:
                    known[shard.key] = census.entries[shard.key]
            else:
                fresh[shard.key] = seen
    entries = {**known, **fresh}
    if set(entries) == set(census.entries) and not fresh:
        return entries, errors
    keys = {}
    for key, entry in entries.items():
        row_keys = census.row_keys(entry)
        if row_keys is None:  # lost: look again
            shard = next(shard for shard in shards if shard.key == key)
            entries[key] = census.count(shard, columns, basis, forget)
            row_keys = census.row_keys(entries[key])
            assert row_keys is not None
        keys[key] = row_keys
    return mark_repeats(entries, keys), errors


def census_basis(columns: ColumnNames, tombstones: Tombstones) -> str:
    """Return the digest of what a census entry depends on beside the file."""
    return digest_of(columns.model_dump_json().encode(), tombstones.digest.encode())[:12]


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


def _sort_out(
    table: Table, base: Snapshot, wanted: Mapping[str, tuple[str, str]], on_disk: Mapping[str, int]
) -> tuple[list[LiveFile], list[str]]:
    """Tell wanted files that lie complete, though not live yet, from those to compute."""
    reused, missing = [], []
    for path, (mode, shard) in wanted.items():
        live = base.files.get(path)
        if live is not None and on_disk.get(path) == live.size:
            continue
        rows = complete_rows(table.place / path) if live is None and path in on_disk else None
        if rows is None:
            missing.append(path)
        else:
            reused.append(LiveFile(path, on_disk[path], rows, {"mode": mode, "shard": shard}))
    return reused, missing


def _by_shard(missing: Iterable[str], wanted: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, tuple[str, str]]]:
    shards: dict[str, dict[str, tuple[str, str]]] = {}
    for path in missing:
        shards.setdefault(wanted[path][1], {})[path] = wanted[path]
    return shards


def _id_type(table: Table) -> str | None:
    schema = table.schema()
    if schema is None:
        return None
    return "string" if pa.types.is_string(schema.field("id").type) else str(schema.field("id").type)


def _schema(
    table: Table, settings: PipelineSettings, entries: Mapping[str, Entry], found: Mapping[str, Shard]
) -> pa.Schema:
    """Return the schema of the features: that of the store, with new kept columns typed as in the first shard."""
    known = table.schema()
    columns = settings.columns
    if known is not None and all(name in known.names for name in columns.keep):
        return known
    first = next((found[key] for key in sorted(entries) if key in found), None)
    if first is None:
        raise SettingsError(f"source {settings.source}: no shard can be read.")
    shard = check_shard(first.key, read_schema(first)[0], columns)
    wanted = feature_schema(shard.id_type, shard.keep)
    if known is None:
        return wanted
    return pa.schema([*known, *(field for field in wanted if field.name not in known.names)])
